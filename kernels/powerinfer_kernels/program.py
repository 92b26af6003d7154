"""Programs: lists of operations that the C extension executes in one call, and the code that collects them.

:mod:`.program_builder` has the operations and their checks.
"""

from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from . import _kernels
from ._kernels import KernelError
from .buffers import Activations, check_cache
from .checks import Array, Floats, check_array, check_positive
from .matrix import Bundle
from .pool import Pool
from .row_types import RowType
from .state import KVSlot, RecurrentSlot, Slot, Span, State

_UNBOUNDED = 1 << 31


_numbered: Any = IntEnum  # mypy wants the names of an enum in the source
#: Operations by name, numbered as operations.h lists them.
Op: Any = _numbered("Op", [(name, number) for number, name in enumerate(_kernels.operations())])


class Program:
    """A complete program; made by `ProgramBuilder.build`. It keeps everything alive that its operations
    use."""

    def __init__(self, handle: _kernels.Program, operations: int, slots: Sequence[Slot] = ()) -> None:
        self._handle = handle
        self.operations = operations
        #: The slots that the state of a session needs.
        self.slots = tuple(slots)

    def run(
        self,
        pool: Pool,
        first: int,
        last: int,
        n_tokens: int,
        position: int = 0,
        state: State | None = None,
    ) -> None:
        """Execute operations [first, last) for `n_tokens` tokens of one session at `position` of its context,
        with the GIL released.

        Raises KernelError for ranges outside the program, its buffers or the context, for token ids
        outside the vocabulary, and for a state that lacks the slots that the operations use.
        """
        handle = None if state is None else state.handle
        self._handle.run(pool.handle, first, last, ((handle, position, n_tokens),))

    def run_spans(self, pool: Pool, first: int, last: int, spans: Sequence[Span]) -> None:
        """:meth:`run` for the tokens of several sessions, in the order of `spans`. Every token gets the bits
        that it would get alone. A state may occur once."""
        packed = tuple(
            (None if state is None else state.handle, position, count) for state, position, count in spans
        )
        self._handle.run(pool.handle, first, last, packed)

    def nanoseconds(self) -> npt.NDArray[np.int64]:
        """Wall time of each operation, added up over all runs: int64 [operations]."""
        return np.frombuffer(self._handle.nanoseconds(), np.int64)

    def neurons(self) -> npt.NDArray[np.int64]:
        """Numbers of neurons of each operation that were active, confirmed and examined, see below: int64
        [operations, 3]; zeros for operations that are not sparse."""
        return np.frombuffer(self._handle.neurons(), np.int64).reshape(-1, 3)

    def active_neurons(self) -> int:
        """Neurons that sparse operations computed, over all runs and tokens."""
        return int(self.neurons()[:, 0].sum())

    def confirmed_neurons(self) -> int:
        """The active neurons whose gate was above the cut; for the other active neurons, only the gate row
        was needed. Where neurons are selected by their gate or by a size alone, all active neurons."""
        return int(self.neurons()[:, 1].sum())

    def total_neurons(self) -> int:
        """Neurons that sparse operations examined."""
        return int(self.neurons()[:, 2].sum())

    def reset_counters(self) -> None:
        """Set times and neuron counts to zero."""
        self._handle.reset_counters()


class OperationList:
    """Operations collected for a program, and the checks that many of them share. All checks raise
    KernelError for arrays that do not fit."""

    def __init__(self, max_tokens: int) -> None:
        check_positive(max_tokens=max_tokens)
        self.max_tokens = max_tokens
        self._capacity = _UNBOUNDED
        self.slots: list[Slot] = []
        self._operations: list[tuple[int, tuple[Any, ...], tuple[int, ...], tuple[float, ...]]] = []

    def mark(self) -> int:
        """Index of the next operation: a point where a run can begin or end."""
        return len(self._operations)

    def kv_slot(self, capacity: int, kv_heads: int, head_dim: int, value_dim: int | None = None) -> KVSlot:
        """A KV cache of up to `capacity` positions in the state of every session; value heads are as wide as
        key heads unless said otherwise."""
        value_dim = head_dim if value_dim is None else value_dim
        check_cache(capacity, kv_heads, head_dim, value_dim)
        slot = KVSlot(len(self.slots), capacity, kv_heads, head_dim, value_dim)
        self.slots.append(slot)
        return slot

    def recurrent_slot(self, count: int) -> RecurrentSlot:
        """`count` float32 values in the state of every session."""
        check_positive(count=count)
        slot = RecurrentSlot(len(self.slots), count)
        self.slots.append(slot)
        return slot

    def build(self) -> Program:
        """The program of all operations so far."""
        handle = _kernels.Program(self.max_tokens, self._capacity)
        for kind, objects, integers, floats in self._operations:
            handle.append(int(kind), objects, integers, floats)
        handle.seal(tuple(slot.spec for slot in self.slots))
        return Program(handle, len(self._operations), self.slots)

    def _append(
        self, kind: int, objects: tuple[Any, ...], integers: tuple[int, ...], floats: tuple[float, ...] = ()
    ) -> None:
        self._operations.append((kind, objects, integers, floats))

    def _limit(self, capacity: int) -> None:
        """No run may reach beyond `capacity` positions."""
        self._capacity = min(self._capacity, capacity)

    def _width(self, name: str, array: Any) -> int:
        if not isinstance(array, np.ndarray) or array.ndim != 2 or not array.shape[1]:
            raise KernelError(f"{name} must be a float32 array of shape ({self.max_tokens}, width)")
        self._check(name, array, array.shape[1])
        return int(array.shape[1])

    def _check(self, name: str, array: Array, width: int, written: bool = False) -> None:
        check_array(name, array, np.float32, (self.max_tokens, width), written)

    def _check_activations(self, activations: Activations, columns: int) -> None:
        if activations.columns != columns or activations.max_tokens < self.max_tokens:
            raise KernelError(
                f"activations for {activations.max_tokens} tokens of {activations.columns} values do not fit "
                f"{self.max_tokens} tokens of {columns}"
            )

    def _check_parts(self, bundle: Bundle, gate: bool = False, up: bool = False, down: bool = False) -> None:
        matrices = (gate, up, down)
        for name, kind, needed in zip(("gate", "up", "down"), bundle.types, matrices, strict=True):
            if (kind is not None) != needed and (needed or name == "gate"):
                raise KernelError(f"the bundle {'has no' if needed else 'must not have'} {name} rows")

    def _both_inputs(
        self, row_types: Sequence[RowType | None], src: Floats, activations: Activations | None, columns: int
    ) -> tuple[Array | None, ...]:
        """(src, q, d, s) for rows of several types: `src` always, the others if any type is quantised."""
        self._check("src", src, columns)
        if all(kind is None or kind.is_float for kind in row_types):
            return (src, None, None, None)
        return (src, *self._inputs(False, src, activations, columns)[1:])

    def _inputs(
        self, is_float: bool, src: Floats, activations: Activations | None, columns: int
    ) -> tuple[Array | None, ...]:
        """(src, q, d, s) with None for arrays that the row type does not use."""
        if is_float:
            self._check("src", src, columns)
            return (src, None, None, None)
        if activations is None:
            raise KernelError("quantised rows need quantised activations")
        self._check_activations(activations, columns)
        return (None, activations.q, activations.d, activations.s)
