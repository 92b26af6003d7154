"""One conversation over shared weights: its KV cache, its position and its counters."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from powerinfer_kernels import State
from powerinfer_tools.engine.closing import Closing
from powerinfer_tools.engine.head import Head
from powerinfer_tools.engine.layers import LayerStack
from powerinfer_tools.errors import ContextFull, ModelError
from powerinfer_tools.model.counting import HEAD_ROWS
from powerinfer_tools.model.footprint import footprint_of
from powerinfer_tools.model.loading import Model
from powerinfer_tools.progress import Progress, Silent

Floats = npt.NDArray[np.float32]


class Shared(Protocol):
    """The interface of the weights that a session shares with other sessions."""

    model: Model
    batch: int
    stack: LayerStack
    head: Head | None

    def session(self, context: int | None = None, kv_type: str | None = None) -> "Session":
        """A new session."""

    def forward(self, parts: "Sequence[tuple[Session, Sequence[int]]]", *, guesses: bool = False) -> None:
        """Run one pass over tokens of sessions; the sessions then hold these tokens."""

    def logits(self, rows: slice | list[int]) -> Floats:
        """Logits of some tokens of the last pass."""

    def forget(self, session: "Session") -> None:
        """Forget a session that is closed."""


@dataclass
class SessionCounters:
    """Counters of one session's own work; seconds are wall time."""

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    decode_tokens: int = 0
    #: Passes over the layers for the decoded tokens: fewer than tokens if drafts were verified.
    decode_passes: int = 0
    decode_seconds: float = 0.0
    #: Bytes of KV cache that decoded tokens read.
    cache_bytes: int = 0


@dataclass(frozen=True)
class Checkpoint:
    """A position in a text, and the state of the recurrent layers there."""

    position: int
    recurrent: tuple[npt.NDArray[np.float32], ...]


class Session(Closing):
    """Tokens and the state that they left; made by :meth:`Weights.session`. ``position`` is the number of
    tokens that the session holds, ``context`` the number that fits."""

    def __init__(self, weights: Shared, state: State, context: int, kv_type: str) -> None:
        self._weights, self._state = weights, state
        self.context, self.kv_type, self.position = context, kv_type, 0
        self.counters = SessionCounters()
        #: The recurrent state at the end of the last prompt, and the number of tokens until there (0: none).
        self._kept = [np.zeros_like(values) for values in state.recurrent]
        self._kept_at = 0

    def keep(self) -> None:
        """Remember the recurrent state, so that the session can return to this position."""
        for kept, values in zip(self._kept, self._state.recurrent, strict=True):
            kept[:] = values
        self._kept_at = self.position if self._kept else 0

    @property
    def state(self) -> State:
        """The buffers that the kernels work on."""
        return self._state

    @property
    def nbytes(self) -> int:
        """Size of the buffers outside the hot device when the context is full, in bytes; memory is taken as
        positions are first written."""
        return self._state.nbytes + sum(values.nbytes for values in self._kept)

    @property
    def touched_bytes(self) -> int:
        """About how many bytes of the buffers the tokens in the session occupy."""
        return self.nbytes * self.position // self.context

    def prefill(self, tokens: Sequence[int], progress: Progress | None = None) -> Floats:
        """Process ``tokens`` after the tokens already held; logits (vocabulary,) after the last of them,
        valid until the next call.

        Raises ContextFull (with nothing changed) when they do not fit.
        """
        if len(tokens) == 0:
            raise ValueError("prefill needs at least one token")
        self.require_room(len(tokens))
        progress = progress or Silent()
        started, batch, count = time.perf_counter(), self._weights.batch, 0
        for first in range(0, len(tokens), batch):
            count = self.forward(tokens[first : first + batch])
            progress.advance(count)
        logits: Floats = self._weights.logits(slice(count - 1, count))[0]
        self.counters.prompt_tokens += len(tokens)
        self.counters.prompt_seconds += time.perf_counter() - started
        return logits

    def decode(self, token: int) -> Floats:
        """Logits (vocabulary,) after one more token; valid until the next call. Raises ContextFull."""
        self.require_room(1)
        weights, counters = self._weights, self.counters
        started, timeline = time.perf_counter(), weights.stack.timeline
        if timeline is not None:
            timeline.restart()
        self.forward([token])
        forwarded = time.perf_counter()
        logits: Floats = weights.logits(slice(0, 1))[0]
        if timeline is not None:
            name = "head" if weights.head else "wait"
            timeline.add("CPU", name, None, forwarded, time.perf_counter())
        counters.decode_tokens += 1
        counters.decode_passes += 1
        counters.cache_bytes += footprint_of(weights.model).cache_bytes_read(self.position, self.kv_type)
        counters.decode_seconds += time.perf_counter() - started
        return logits

    @property
    def no_drafts(self) -> str | None:
        """Why guesses cannot be verified for this session, in words for the user; None where they can."""
        stack = self._weights.stack
        if stack.has_hot_side:
            return f"sums of the {stack.device} device may depend on how many tokens it computes at a time"
        return None

    def checkpoint(self) -> "Checkpoint | None":
        """The state that :meth:`restore` returns to, as a recurrence cannot be rewound; None without a
        recurrence."""
        if not self._state.recurrent:
            return None
        return Checkpoint(self.position, tuple(values.copy() for values in self._state.recurrent))

    def restore(self, checkpoint: "Checkpoint") -> None:
        """Forget all tokens since ``checkpoint``, which this session made; the state has the same bits as
        then."""
        for values, kept in zip(self._state.recurrent, checkpoint.recurrent, strict=True):
            values[:] = kept
        self.position = checkpoint.position
        if self._kept_at > self.position:
            self._kept_at = 0  # the kept state includes forgotten tokens

    @property
    def most_verified(self) -> int:
        """The largest number of tokens for :meth:`verify`."""
        return min(HEAD_ROWS, self._weights.batch)

    def verify(self, tokens: Sequence[int]) -> Floats:
        """Logits (tokens, vocabulary) after one more token and after each guess that follows it, in one pass;
        valid until the next call. Counts as one decoded token. Raises ContextFull."""
        self.require_room(len(tokens))
        assert len(tokens) <= self.most_verified
        started, counters = time.perf_counter(), self.counters
        count = self.forward(tokens, guesses=True)
        logits = self._weights.logits(slice(0, count))
        counters.decode_tokens += 1
        counters.decode_passes += 1
        footprint = footprint_of(self._weights.model)
        counters.cache_bytes += footprint.cache_bytes_read(self.position, self.kv_type)
        counters.decode_seconds += time.perf_counter() - started
        return logits

    def process(self, tokens: Sequence[int], rows: int) -> Iterator[Floats]:
        """Process ``tokens`` after the tokens already held. Yields logits (vocabulary,) after each of the
        last ``rows`` tokens; each array is valid until the next is requested. Raises ContextFull."""
        for logits in self.logits_from(tokens, len(tokens) - rows):
            yield from logits

    def logits_from(self, tokens: Sequence[int], first: int) -> Iterator[Floats]:
        """As :meth:`process`, for the tokens from ``first`` on, up to HEAD_ROWS (k, vocabulary) at a time."""
        self.require_room(len(tokens))
        batch = self._weights.batch
        for start in range(0, len(tokens), batch):
            count = self.forward(tokens[start : start + batch])
            for row in range(max(0, first - start), count, HEAD_ROWS):
                yield self._weights.logits(slice(row, min(row + HEAD_ROWS, count)))

    def forward(self, tokens: Sequence[int], *, guesses: bool = False) -> int:
        """Run up to a batch of ``tokens`` through the layers; returns their number. With ``guesses`` (guessed
        tokens, or tokens read again because of wrong guesses), the recurrent state is not kept as the end of
        a prompt."""
        self._weights.forward([(self, tokens)], guesses=guesses)
        return len(tokens)

    def rewind(self, position: int) -> int:
        """Forget everything from ``position`` on. If a recurrence holds more tokens, forget everything after
        the last prompt, or everything, as its state cannot return to any other position. Returns the number
        of tokens that remain."""
        if not 0 <= position <= self.position:
            raise ValueError(f"cannot rewind to {position}: the cache holds {self.position} tokens")
        if position != self.position and self._state.recurrent:
            position = self._restore(self, position)
        self.position = position
        return position

    def _restore(self, source: "Session", position: int) -> int:
        """Copy the recurrent state of ``source`` at the end of its last prompt, or nothing if that is after
        ``position``; returns the number of tokens in the copied state."""
        start = source._kept_at if source._kept_at <= position else 0
        for values, kept in zip(self._state.recurrent, source._kept, strict=True):
            values[:] = kept if start else 0
        if not start:
            self._kept_at = 0
        return start

    def copy_prefix(self, source: "Session", positions: int) -> int:
        """Replace the contents by the first ``positions`` tokens of ``source``, bit for bit. If a recurrence
        of ``source`` holds more tokens, take the tokens up to the end of its last prompt, or none. Returns
        the number of tokens.

        Raises ValueError if ``source`` holds fewer tokens or belongs to other weights, ContextFull if the
        tokens do not fit, ModelError if the two caches differ in type.
        """
        if source._weights is not self._weights or not 0 <= positions <= source.position:
            raise ValueError(f"the other session has not {positions} tokens of the same weights")
        if positions > self.context:
            raise ContextFull(f"{positions} tokens do not fit in a context of {self.context}")
        if source.kv_type != self.kv_type:
            raise ModelError(f"a {source.kv_type} cache cannot be copied into one of type {self.kv_type}")
        elsewhere = positions != source.position and bool(source._state.recurrent)
        if elsewhere and not 0 < source._kept_at <= positions:
            return self.rewind(0)
        positions = source._kept_at if elsewhere else positions
        if source is not self:
            self._state.copy_positions(source._state, positions)
        if elsewhere:
            self._restore(source, positions)
        self.position = positions
        if source is not self:
            self.keep()
        return positions

    def fork(self, context: int | None = None) -> "Session":
        """A new session that holds the same tokens, of the same context by default. Raises as
        :meth:`Weights.session` and :meth:`copy_prefix` do."""
        other = self._weights.session(self.context if context is None else context, self.kv_type)
        try:
            other.copy_prefix(self, self.position)
        except BaseException:
            other.close()
            raise
        return other

    def is_open_on(self, weights: Shared) -> bool:
        """Whether this is an open session of ``weights``."""
        return self._weights is weights and self.context > 0

    def require_room(self, tokens: int) -> None:
        """Raise ContextFull unless ``tokens`` more tokens fit."""
        if self.position + tokens > self.context:
            raise ContextFull(
                f"{tokens} more tokens do not fit: the context holds {self.context} and {self.position} "
                "are used; ask for a longer context (-c) or start anew"
            )

    def close(self) -> None:
        """Release the buffers. The session cannot be used afterwards; closing it again does nothing."""
        if self.context:
            self._weights.forget(self)
            self._state, self._kept = State([]), []
            self.context = self.position = 0
