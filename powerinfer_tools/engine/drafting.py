"""Exact drafts: several guessed tokens are verified in one pass.

The caller asks for the logits after one token at a time, as without drafts. Where the token that it chose is
the one that was guessed, its logits are there already; else the guesses are forgotten. As no bit depends on
what else is in a pass, the text is the same with and without drafts, greedy or sampled.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from powerinfer_tools.engine.draft_length import MOST, DraftLength
from powerinfer_tools.engine.session import Checkpoint, Session
from powerinfer_tools.errors import ModelError
from powerinfer_tools.progress import Progress

Floats = npt.NDArray[np.float32]
#: Lengths of the ends of a text that are looked up in it, longest first.
_LOOKED_UP = (4, 3, 2)


class Proposer(Protocol):
    """What guesses how a text goes on."""

    def propose(self, tokens: Sequence[int], most: int) -> list[int]:
        """Up to ``most`` tokens that may follow ``tokens``."""

    def forget(self) -> None:
        """The text was cut: what is kept of it may be wrong."""

    def close(self) -> None:
        """Give back what was opened."""


class TextLookup:
    """Guesses that what followed the last few tokens before follows them again."""

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], int] = {}  # tokens → index of what followed them last
        self._seen = 0

    def propose(self, tokens: Sequence[int], most: int) -> list[int]:
        """What followed the longest end of ``tokens`` that was there before; nothing where none was."""
        for end in range(max(1, self._seen), len(tokens)):
            for count in _LOOKED_UP:
                if count <= end:
                    self._after[tuple(tokens[end - count : end])] = end
        self._seen = len(tokens)
        for count in _LOOKED_UP:
            start = self._after.get(tuple(tokens[-count:])) if count <= len(tokens) else None
            if start is not None:
                guessed = list[int]()
                while len(guessed) < most:  # beyond the end, the guess repeats itself
                    at = start + len(guessed)
                    guessed.append(tokens[at] if at < len(tokens) else guessed[at - len(tokens)])
                return guessed
        return []

    def forget(self) -> None:
        """Look at the text anew."""
        self._after.clear()
        self._seen = 0

    def close(self) -> None:
        """Nothing is open."""


class ModelDrafts:
    """Guesses what a smaller model would say: the likeliest token, one after the other. ``session`` is a
    fresh one of that model, and is closed with this."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._held: list[int] = []

    def propose(self, tokens: Sequence[int], most: int) -> list[int]:
        """The smaller model's text, as far as its context goes."""
        most = min(most, self._session.context - len(tokens))
        if most < 1:
            return []
        common = min(len(self._held), len(tokens) - 1)
        while self._held[:common] != list(tokens[:common]):
            common -= 1
        common = self._session.rewind(common)
        del self._held[common:]
        logits = self._session.prefill(list(tokens[common:]))
        guessed = [int(logits.argmax())]
        self._held += tokens[common:]
        while len(guessed) < most:
            logits = self._session.decode(guessed[-1])
            self._held.append(guessed[-1])
            guessed.append(int(logits.argmax()))
        return guessed

    def forget(self) -> None:
        """What is held is compared with the text each time."""

    def close(self) -> None:
        """Close the session."""
        self._session.close()


@dataclass
class DraftCounters:
    """What drafts did: tokens that were ``drafted`` and ``accepted`` of them; ``tokens`` decoded in
    ``passes`` and ``seconds``, drafting included."""

    drafted: int = 0
    accepted: int = 0
    tokens: int = 0
    passes: int = 0
    seconds: float = 0.0


class Drafter:
    """Decodes for one session, which must be empty, with the drafts of ``proposer``.

    Recurrent layers cannot forget what they have read: where guesses turn out wrong, they go back to what
    they were before the pass, and read again what was right.

    Raises ModelError where bits may depend on the size of a batch (a hot device).
    """

    def __init__(self, session: Session, proposer: Proposer) -> None:
        reason = session.no_drafts
        if reason is not None:
            raise ModelError(f"no drafts: {reason}")
        assert session.position == 0
        self._session, self._proposer = session, proposer
        self.length, self.counters = DraftLength(), DraftCounters()
        self._tokens: list[int] = []
        self._ahead: list[int] = []  # guesses whose logits are there
        self._rows: Floats | None = None
        self._pass: tuple[int, float, float] | None = None  # drafted, seconds, seconds of drafting
        self._before: Checkpoint | None = None

    @property
    def position(self) -> int:
        """Tokens of the text so far: guesses are none."""
        return len(self._tokens)

    @property
    def speed_up(self) -> float | None:
        """How much faster than token by token, by what a single one took; None where none was decoded so."""
        single, counters = self.length.single, self.counters
        return counters.tokens * single / counters.seconds if single and counters.seconds else None

    def prefill(self, tokens: Sequence[int], progress: Progress | None = None) -> Floats:
        """:meth:`Session.prefill`."""
        self.settle()
        logits = self._session.prefill(tokens, progress)
        self._tokens += tokens
        return logits

    def decode(self, token: int) -> Floats:
        """:meth:`Session.decode`."""
        if self._rows is not None and self._ahead and self._ahead[0] == token:
            del self._ahead[0]
            self._tokens.append(token)
            self.counters.accepted += 1
            self.counters.tokens += 1
            self._session.counters.decode_tokens += 1
            row: Floats = self._rows[len(self._rows) - 1 - len(self._ahead)]
            return row
        self.settle()
        self._session.require_room(1)
        return self._pass_over(token)

    def rewind(self, position: int) -> int:
        """:meth:`Session.rewind`."""
        self.settle()
        held = self._session.rewind(position)
        if held < len(self._tokens):
            del self._tokens[held:]
            self._proposer.forget()
        return held

    def logits(self, tokens: Sequence[int]) -> Iterator[Floats]:
        """:meth:`Session.logits_from` the first of ``tokens``."""
        self.settle()
        yield from self._session.logits_from(tokens, 0)
        self._tokens += tokens

    def close(self) -> None:
        """Close what proposes."""
        self._proposer.close()

    def _pass_over(self, token: int) -> Floats:
        """``token`` and the guesses that seem to pay."""
        self._tokens.append(token)
        try:
            return self._verified()
        except BaseException:
            self._tokens.pop()
            raise

    def _verified(self) -> Floats:
        """:meth:`_pass_over` the last token of the text."""
        started, session, text = time.perf_counter(), self._session, self._tokens
        most = min(session.context - len(text) + 1, session.most_verified) - 1
        length, guesses = self.length.choose(min(most, MOST)), list[int]()
        if length:
            guesses = self._proposer.propose(text, length)
        drafting = time.perf_counter() - started
        self._before = session.checkpoint() if guesses else None
        rows = session.verify([text[-1], *guesses])
        taken = time.perf_counter() - started
        self._ahead, self._rows = guesses, rows
        self._pass = (len(guesses), taken - drafting, drafting)
        counters = self.counters
        counters.drafted += len(guesses)
        counters.tokens += 1
        counters.passes += 1
        counters.seconds += taken
        first: Floats = rows[0]
        return first

    def settle(self) -> None:
        """Forget the guesses that did not come true, and learn from the last pass."""
        again = self._forget_guesses()
        if self._pass is not None:
            drafted, seconds, drafting = self._pass
            self.length.passed(drafted, drafted - len(self._ahead), seconds + again, drafting)
            self.counters.seconds += again
        self._ahead, self._rows, self._pass, self._before = [], None, None, None

    def _forget_guesses(self) -> float:
        """Hold the text alone; seconds that it took to read a part of it again."""
        session, count = self._session, len(self._tokens)
        if session.position <= count or self._before is None:
            session.rewind(min(session.position, count))
            return 0.0
        started = time.perf_counter()
        session.restore(self._before)
        session.forward(self._tokens[session.position :], guesses=True)
        return time.perf_counter() - started
