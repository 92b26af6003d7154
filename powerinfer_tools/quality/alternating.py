"""Two ways of running one packed model, compared without a second copy of its weights."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from powerinfer_tools.engine import Engine
from powerinfer_tools.engine.session import Session
from powerinfer_tools.model.counting import HEAD_ROWS
from powerinfer_tools.model.loading import Model

Floats = npt.NDArray[np.float32]


class Alternating:
    """Scores windows in ``session``, one of the sessions on ``engine``'s weights. ``prepare`` sets what
    differs between the ways. It is called before each pass, so that passes of several ways may alternate."""

    def __init__(self, engine: Engine, session: Session, prepare: Callable[[], None]) -> None:
        self._engine, self._session, self._prepare = engine, session, prepare

    @property
    def model(self) -> Model:
        """The model."""
        return self._engine.model

    @property
    def vocabulary(self) -> int:
        """The number of logits."""
        return self._engine.vocabulary

    def score(self, tokens: Sequence[int], first: int = 0) -> Iterator[Floats]:
        """As :meth:`powerinfer_tools.engine.Engine.score`, with the same bits; each array stays valid."""
        session, batch = self._session, self._engine.batch
        session.rewind(0)
        for begin in range(0, first, batch):
            self._prepare()
            session.forward(tokens[begin : min(begin + batch, first)])
        for begin in range(first, len(tokens), min(batch, HEAD_ROWS)):
            self._prepare()
            yield from (
                logits.copy()
                for logits in session.logits_from(tokens[begin : begin + min(batch, HEAD_ROWS)], 0)
            )
