"""Slots that are sessions of shared weights."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from powerinfer_tools.engine.session import Session
from powerinfer_tools.engine.weights import Part, Weights
from powerinfer_tools.errors import ModelError
from powerinfer_tools.serving.jobs import Logits
from powerinfer_tools.serving.slots import Wanted, Work


class SessionSlots:
    """A session for each slot; all are computed in one pass. ``first`` is a session that is open already.

    Raises ModelError where memory does not suffice for ``count``.
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
        """How many there are."""
        return len(self.sessions)

    @property
    def fixed_slice(self) -> int | None:
        """The batch of the engine where torch computes, whose sums depend on how many tokens there are."""
        return self._weights.batch if self._weights.stack.has_hot_side else None

    def step(self, work: Sequence[Work]) -> list[Logits]:
        """One pass over tokens of different slots."""
        rows = [len(piece.tokens) if piece.wanted is Wanted.ALL else 1 for piece in work]
        parts = [
            Part(self.sessions[piece.slot], piece.tokens, count)
            for piece, count in zip(work, rows, strict=True)
        ]
        logits, first = self._weights.step(parts), 0
        result = []
        for piece, count in zip(work, rows, strict=True):
            result.append(logits[first : first + (0 if piece.wanted is Wanted.NONE else count)])
            first += count
        return result

    def rewind(self, slot: int, position: int) -> int:
        """Forget what the slot holds from ``position`` on."""
        return self.sessions[slot].rewind(position)

    def copy(self, source: int, target: int, count: int) -> int:
        """Copy the first ``count`` tokens."""
        return self.sessions[target].copy_prefix(self.sessions[source], count)

    @property
    def layout(self) -> list[tuple[Any, ...]] | None:
        """What decides where the bytes of a block belong; None where a recurrence keeps more than tokens."""
        state = self.sessions[0].state
        if state.recurrent:
            return None
        return [(cache.kind, cache.kv_heads, cache.head_dim, cache.value_dim) for cache in state.caches]

    def block_bytes(self, count: int) -> int:
        """Bytes of ``count`` tokens."""
        return sum(piece.nbytes for piece in self._pieces(0, 0, count))

    def block(self, slot: int, first: int, count: int) -> bytes:
        """What the slot holds of ``count`` tokens from ``first`` on, layer by layer."""
        return b"".join(piece.tobytes() for piece in self._pieces(slot, first, count))

    def restore(self, slot: int, first: int, count: int, data: bytes) -> None:
        """Make the slot hold these, and all tokens before them."""
        at = 0
        for piece in self._pieces(slot, first, count):
            values = np.frombuffer(data, piece.dtype, piece.size, at)
            piece[:] = values.reshape(piece.shape)
            at += piece.nbytes
        self.sessions[slot].position = first + count

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
