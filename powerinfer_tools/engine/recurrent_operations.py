"""The recurrent part of the vocabulary as a program of the C kernels. Values that are kept from token to
token are in slots of the session's state."""

import math
from abc import ABC, abstractmethod

from powerinfer_kernels import ProgramBuilder
from powerinfer_tools.engine.buffers import Floats, Scratch
from powerinfer_tools.engine.values import Value
from powerinfer_tools.model.hyperparameter_types import RecurrentSizes
from powerinfer_tools.model.tensors import Table, Vector


class RecurrentOperations(ABC):
    """Needs the buffers and the builder of :class:`.program_operations.ProgramOperations`."""

    _scratch: Scratch

    @abstractmethod
    def flush(self) -> ProgramBuilder:
        """The program, after all pending products were written."""

    @abstractmethod
    def changed(self, floats: Floats) -> None:
        """Note that ``floats`` hold new values from here on."""

    def part(self, name: str, x: Value, first: int, count: int) -> Value:
        """A copy."""
        builder, out = self.flush(), self._made(name, count)
        builder.copy(x.floats, out.floats, count, src_first=first)
        return out

    def times(self, x: Value, y: Value | Vector, repeat: int = 1) -> Value:
        """In place of ``x``."""
        self.flush().multiply(y.floats if isinstance(y, Value) else y, x.floats, repeat)
        self.changed(x.floats)
        return x

    def plus(self, x: Value, vector: Vector) -> Value:
        """In place of ``x``."""
        self.flush().add(vector, x.floats)
        self.changed(x.floats)
        return x

    def unit_heads(self, x: Value, heads: int, eps: float) -> Value:
        """In place of ``x``."""
        self.flush().l2_norm(x.floats, x.floats, eps, groups=heads)
        self.changed(x.floats)
        return x

    def convolve(
        self, name: str, x: Value, weight: Table, bias: Vector | None, first: int, *, silu: bool
    ) -> Value:
        """Its inputs are kept."""
        builder, (length, width) = self.flush(), weight.shape
        out, slot = self._made(name, width), builder.recurrent_slot((length - 1) * width)
        builder.convolve(x.floats, weight, bias, out.floats, slot, src_first=first, silu=silu)
        return out

    def scan_channels(
        self, name: str, x: Value, steps: Value, vectors: Value, decay: Table, direct: Vector
    ) -> Value:
        """S is kept."""
        builder, (size, width) = self.flush(), decay.shape
        out, slot = self._made(name, width), builder.recurrent_slot(size * width)
        places = (vectors.floats, 0, size)
        builder.scan_channels(x.floats, steps.floats, decay, places, direct, out.floats, slot)
        return out

    def scan_heads(
        self, name: str, x: Value, steps: Value, decay: Vector, direct: Vector, sizes: RecurrentSizes
    ) -> Value:
        """S is kept."""
        builder, s = self.flush(), sizes
        out, slot = self._made(name, s.inner), builder.recurrent_slot(s.state * s.inner)
        places = (x.floats, s.inner, s.inner + s.groups * s.state)
        builder.scan_heads(
            x.floats,
            steps.floats,
            decay,
            places,
            direct,
            out.floats,
            slot,
            size=s.state,
            groups=s.groups,
        )
        return out

    def delta_net(
        self,
        name: str,
        both: Value,
        x: Value,
        decay: Value,
        rate: Value,
        sizes: RecurrentSizes,
        *,
        interleaved: bool,
    ) -> Value:
        """S is kept."""
        builder, s = self.flush(), sizes
        out, slot = self._made(name, s.inner), builder.recurrent_slot(s.state * s.inner)
        builder.delta_net(
            both.floats,
            x.floats,
            decay.floats,
            rate.floats,
            out.floats,
            slot,
            key_heads=s.groups,
            scale=1 / math.sqrt(s.state),
            v_first=x.floats.shape[1] - s.inner,
            interleaved=interleaved,
        )
        return out

    def general_delta(
        self,
        name: str,
        query: Value,
        key: Value,
        value: Value,
        decay: Value,
        unit: Value,
        rate: Value,
        heads: int,
    ) -> Value:
        """S is kept."""
        builder, width = self.flush(), value.floats.shape[1]
        out = self._made(name, width)
        slot = builder.recurrent_slot(query.floats.shape[1] // heads * width)
        builder.general_delta(
            query.floats,
            key.floats,
            value.floats,
            decay.floats,
            unit.floats,
            rate.floats,
            out.floats,
            slot,
            heads=heads,
        )
        return out

    def _made(self, name: str, width: int) -> Value:
        out = self._scratch.named(name, width)
        self.changed(out)
        return Value(out)
