"""What leaving neurons out costs in quality, measured with the engine in the mode that will run."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from powerinfer_formats.predictors import LayerPredictor
from powerinfer_tools.engine import Engine
from powerinfer_tools.model.loading import Model
from powerinfer_tools.model.split_rows import split_in_memory

Floats = npt.NDArray[np.float32]
#: Memory for the exact model's predictions, which every measurement is compared with.
_KEPT_BYTES = 512 << 20


@dataclass(frozen=True)
class Measured:
    """Perplexity of the model as it is and with predictors, over the same ``tokens``; ``divergence`` is the
    mean of KL(as it is ‖ with predictors) in nats a token.

    Where the text is what the model expects, ln of the perplexities' ratio has the divergence as its mean;
    the divergence is positive by nature and varies much less from text to text, so choices go by it.
    """

    perplexity: float
    predicted_perplexity: float
    divergence: float
    tokens: int

    @property
    def increase(self) -> float:
        """Relative increase of perplexity."""
        return self.predicted_perplexity / self.perplexity - 1


class Meter:
    """A model with trial predictors in every layer, whose thresholds are set for each measurement.

    ``windows`` of token ids, all of one length, are scored as perplexity is: the second half of each.
    """

    def __init__(
        self,
        model: Model,
        made: Sequence[LayerPredictor],
        row_type: str,
        windows: Sequence[list[int]],
        threads: int | None,
    ) -> None:
        self.windows = windows
        length = len(windows[0])
        split = split_in_memory(model, made, row_type)
        self._engine = Engine(split, threads=threads, context=length, batch=length)
        scored = len(windows) * (length - length // 2)
        self._step = max(1, math.ceil(scored * model.hyper.vocabulary * 4 / _KEPT_BYTES))
        self._layers = len(made)
        self._exact: dict[int, tuple[Floats, float]] = {}

    def close(self) -> None:
        """Stop the engine."""
        self._engine.close()

    def measure(self, thresholds: Sequence[Floats | None], some: Sequence[int]) -> Measured:
        """The model with these thresholds, over ``some`` of the windows; a layer of None is exact."""
        exact = [self._exactly(index) for index in some]
        self._set(thresholds)
        trial = [self._scored(self.windows[index]) for index in some]
        divergences = [
            (np.exp(before) * (before - after)).sum(axis=1, dtype=np.float64)
            for (before, _), (after, _) in zip(exact, trial, strict=True)
        ]
        tokens = sum(len(self.windows[index]) - 1 - len(self.windows[index]) // 2 for index in some)
        losses = [sum(loss for _, loss in scores) / tokens for scores in (exact, trial)]
        return Measured(
            perplexity=math.exp(losses[0]),
            predicted_perplexity=math.exp(losses[1]),
            divergence=max(0.0, float(np.concatenate(divergences).mean())),
            tokens=tokens,
        )

    def _set(self, thresholds: Sequence[Floats | None]) -> None:
        for layer, values in enumerate(thresholds):
            self._engine.stack.set_thresholds(layer, values)

    def _exactly(self, index: int) -> tuple[Floats, float]:
        if index not in self._exact:
            self._set([None] * self._layers)
            self._exact[index] = self._scored(self.windows[index])
        return self._exact[index]

    def _scored(self, window: list[int]) -> tuple[Floats, float]:
        """ln of the predicted probabilities at every :attr:`_step`-th position of the second half, and the
        sum of −ln of those of the tokens that came, over all of them."""
        first = position = len(window) // 2
        kept, loss = [], 0.0
        for logits in self._engine.score(window, first):
            rows = logits[: len(window) - 1 - position]
            logs = _log_softmax(rows)
            targets = window[position + 1 : position + 1 + len(rows)]
            loss -= float(logs[np.arange(len(rows)), targets].sum(dtype=np.float64))
            kept.append(logs[(first - position) % self._step :: self._step])
            position += len(logits)
        return np.concatenate(kept), loss


def _log_softmax(logits: Floats) -> Floats:
    shifted = logits - logits.max(axis=1, keepdims=True)
    total = np.log(np.exp(shifted).sum(axis=1, dtype=np.float64, keepdims=True))
    return np.asarray(shifted - total.astype(np.float32), np.float32)
