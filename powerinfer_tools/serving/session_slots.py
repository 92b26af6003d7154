"""Slots that are sessions of shared weights."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from powerinfer_tools.engine.session import Session
from powerinfer_tools.engine.weights import Part, Weights
from powerinfer_tools.errors import ModelError
from powerinfer_tools.model.counting import HEAD_ROWS
from powerinfer_tools.serving.jobs import Logits
from powerinfer_tools.serving.slots import Wanted, Work


class SessionSlots:
    """A session for each slot; all are computed in one pass. ``first`` is a session that is already open.

    Raises ModelError if memory does not suffice for ``count`` slots.
    """

    def __init__(self, weights: Weights, first: Session, count: int) -> None:
        self.context = first.context
        self._weights = weights
        with ExitStack() as stack:
            others = [stack.enter_context(weights.session(first.context)) for _ in range(count - 1)]
            stack.pop_all()
        self.sessions = [first, *others]

    @property
    def count(self) -> int:
        """The number of slots."""
        return len(self.sessions)

    @property
    def fixed_slice(self) -> int | None:
        """The engine's batch size if torch computes, since its sums depend on the number of tokens."""
        return self._weights.batch if self._weights.stack.has_hot_side else None

    def step(self, work: Sequence[Work]) -> list[Logits]:
        """One pass over tokens of different slots."""
        rows = [len(piece.tokens) if piece.logits is Wanted.ALL else 1 for piece in work]
        parts = [
            Part(self.sessions[piece.slot], piece.tokens, count)
            for piece, count in zip(work, rows, strict=True)
        ]
        logits, first = self._weights.step(parts), 0
        result = []
        for piece, count in zip(work, rows, strict=True):
            result.append(logits[first : first + (0 if piece.logits is Wanted.NONE else count)])
            first += count
        return result

    def write(self, slots: Sequence[int], tokens: Sequence[int]) -> Logits:
        """One token of each of different slots."""
        if len(slots) > HEAD_ROWS:
            parts = [Part(self.sessions[slot], (token,)) for slot, token in zip(slots, tokens, strict=True)]
            return self._weights.step(parts)
        return self._weights.write([self.sessions[slot] for slot in slots], tokens)

    def check(self, logits: Logits) -> None:
        """Raise ModelError unless all are finite."""
        self._weights.check(logits)

    def rewind(self, slot: int, position: int) -> int:
        """Forget what the slot holds from ``position`` on."""
        return self.sessions[slot].rewind(position)

    def copy(self, source: int, target: int, count: int) -> int:
        """Copy the first ``count`` tokens."""
        return self.sessions[target].copy_prefix(self.sessions[source], count)

    @property
    def layout(self) -> list[Any]:
        """Everything that decides where the bytes of a block belong and, where torch computes a part, which
        bits they are: JSON values."""
        state, hot = self.sessions[0].state, self._weights.stack.hot
        caches = [(cache.kind, cache.kv_heads, cache.head_dim, cache.value_dim) for cache in state.caches]
        device = None if hot is None else [hot.identity, hot.cache_bytes(16)]
        return [caches, [values.size for values in state.recurrent], self.fixed_slice, device]

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of a checkpoint; 0 where there is no recurrence."""
        return sum(values.nbytes for values in self.sessions[0].state.recurrent)

    def checkpoint(self, slot: int) -> bytes:
        """The values of all recurrences, layer by layer."""
        return b"".join(values.tobytes() for values in self.sessions[slot].state.recurrent)

    def block_bytes(self, count: int) -> int:
        """Bytes of ``count`` tokens, here and on the hot device."""
        hot = self._weights.stack.hot
        return self._host_bytes(count) + (0 if hot is None else hot.cache_bytes(count))

    def block(self, slot: int, first: int, count: int) -> bytes:
        """The slot's contents for ``count`` tokens from ``first`` on, layer by layer, and after these the hot
        device's contents. A hot device that holds anything serves only one slot."""
        hot = self._weights.stack.hot
        here = [piece.tobytes() for piece in self._pieces(slot, first, count)]
        return b"".join((*here, b"" if hot is None else hot.cache_block(first, count)))

    def restore(self, slot: int, first: int, count: int, data: bytes) -> None:
        """Write a block to its place in the slot."""
        hot, here = self._weights.stack.hot, self._host_bytes(count)
        _fill(self._pieces(slot, first, count), data[:here])
        if hot is not None and len(data) > here:
            hot.restore_cache(first, count, data[here:])

    def hold(self, slot: int, count: int, checkpoint: bytes | None) -> None:
        """Make the slot hold the first ``count`` tokens."""
        session = self.sessions[slot]
        if checkpoint is not None:
            _fill(session.state.recurrent, checkpoint)
        session.position = count
        session.keep()  # the remembered tokens belong to another text

    def _host_bytes(self, count: int) -> int:
        return sum(piece.nbytes for piece in self._pieces(0, 0, count))

    def _pieces(self, slot: int, first: int, count: int) -> Iterator[Any]:
        """The parts of all arrays of a slot that belong to some tokens: keys by tiles of 16, values."""
        for cache in self.sessions[slot].state.caches:
            for array, width in zip(cache.arrays, (16, 1, 16, 1), strict=True):
                if array is not None:
                    yield array[:, first // width : (first + count) // width]

    @property
    def nbytes(self) -> int:
        """Bytes of all caches when they are full."""
        return sum(session.nbytes for session in self.sessions)


def _fill(arrays: Iterable[Any], data: bytes) -> None:
    """Write ``data`` into ``arrays``, one after the other."""
    at = 0
    for array in arrays:
        array[:] = np.frombuffer(data, array.dtype, array.size, at).reshape(array.shape)
        at += array.nbytes


def slot_count(session: Session, weights: Weights, parallel: int, budget: int | None) -> int:
    """How many slots fit in ``budget`` bytes; without one, two for each of ``parallel`` requests, so that
    conversations that pause keep what they have. Raises ModelError where not even one fits."""
    if weights.stack.serves_one:
        return 1
    if budget is None:
        return 2 * parallel
    count = budget // session.nbytes
    if count < 1:
        raise ModelError(
            f"{weights.model.path}: the cache of one request takes {session.nbytes} bytes, more than the "
            f"{budget} given (--kv-memory); ask for a shorter context (-c)"
        )
    return min(count, 16 * parallel)
