"""The state that a session keeps from token to token: a list of slots, each a buffer of a known type.

Operations of a program name a slot by its index (:class:`KVSlot`, :class:`RecurrentSlot`). Every token of a
run comes with the :class:`State` that the operations work on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from . import _kernels
from ._kernels import KernelError
from .buffers import KVCache, aligned
from .checks import Floats, check_positive

_KV, _RECURRENT = 0, 1


@dataclass(frozen=True)
class KVSlot:
    """Keys and values of one layer, for up to ``capacity`` positions; a state may hold fewer."""

    index: int
    capacity: int
    kv_heads: int
    head_dim: int
    value_dim: int

    @property
    def spec(self) -> tuple[int, ...]:
        """`pi_slot_spec` of program.h."""
        return (_KV, self.capacity, self.kv_heads, self.head_dim, self.value_dim)


@dataclass(frozen=True)
class RecurrentSlot:
    """``count`` float32 values that every token of a session reads and replaces; zero before the first."""

    index: int
    count: int

    @property
    def spec(self) -> tuple[int, ...]:
        """`pi_slot_spec` of program.h."""
        return (_RECURRENT, self.count)


Slot = KVSlot | RecurrentSlot
#: The contents of a slot: a cache, or float32 values of a recurrence.
Buffer = KVCache | Floats


class State:
    """The buffers of one session, in the order of the slots. At most one run at a time works on it."""

    def __init__(self, buffers: Sequence[Buffer]) -> None:
        self.buffers = tuple(buffers)
        self._handle = _kernels.State(tuple(_packed(buffer) for buffer in self.buffers))

    @classmethod
    def allocate(cls, slots: Sequence[Slot], capacity: int, kind: str = "f16") -> "State":
        """A state with these ``slots``: caches of ``capacity`` positions of type ``kind``, and zeros.

        Raises KernelError when a slot holds fewer positions, or memory is short.
        """
        return cls([_allocated(slot, capacity, kind) for slot in slots])

    @property
    def handle(self) -> _kernels.State:
        """The C extension's object for this state."""
        return self._handle

    @property
    def caches(self) -> list[KVCache]:
        """The KV caches."""
        return [buffer for buffer in self.buffers if isinstance(buffer, KVCache)]

    @property
    def recurrent(self) -> "list[Floats]":
        """The values of recurrences."""
        return [buffer for buffer in self.buffers if not isinstance(buffer, KVCache)]

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers when their caches are full."""
        return sum(buffer.nbytes for buffer in self.buffers)

    def copy_positions(self, source: "State", positions: int) -> None:
        """Copy the keys and values of the first ``positions`` of ``source``, bit for bit, and the present
        values of its recurrences. Raises KernelError if the two states differ in kind, or lack room."""
        if len(self.buffers) != len(source.buffers):
            raise KernelError("the two states have different slots")
        for mine, other in zip(self.buffers, source.buffers, strict=True):
            if isinstance(mine, KVCache) and isinstance(other, KVCache):
                mine.copy_positions(other, positions)
            elif isinstance(mine, np.ndarray) and isinstance(other, np.ndarray) and mine.shape == other.shape:
                mine[:] = other
            else:
                raise KernelError("the two states have different slots")


class Span(NamedTuple):
    """``tokens`` successive tokens of a run that belong to one session, the first at ``position``. ``state``
    None: they use no slots."""

    state: State | None
    position: int
    tokens: int


def _allocated(slot: Slot, capacity: int, kind: str) -> Buffer:
    check_positive(capacity=capacity)
    if isinstance(slot, RecurrentSlot):
        return aligned((slot.count,), np.float32)
    if capacity > slot.capacity:
        raise KernelError(f"a slot of {slot.capacity} positions cannot hold {capacity}")
    return KVCache(capacity, slot.kv_heads, slot.head_dim, kind, slot.value_dim)


def _packed(buffer: Buffer) -> tuple[Any, ...]:
    if isinstance(buffer, KVCache):
        sizes = (buffer.capacity, buffer.kv_heads, buffer.head_dim, buffer.value_dim)
        return (_KV, buffer.buffers, *sizes)
    return (_RECURRENT, (buffer,), buffer.size)
