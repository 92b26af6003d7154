"""The vocabulary of :mod:`powerinfer_tools.model.operations` as a program of the C kernels.

Values are named buffers. A product is only noted when it is requested, and written when the next operation
needs the program. So products of the same input follow each other without a barrier, inputs are quantised
once, and a product for the residual stream is added to it as it is computed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from powerinfer_kernels import Activations, KVSlot, Matrix, Pool, ProgramBuilder
from powerinfer_kernels.reference import alibi_slopes
from powerinfer_tools.engine.buffers import Floats, Integers, Scratch, place
from powerinfer_tools.engine.factor_thresholds import FactorThresholds
from powerinfer_tools.engine.observation import LayerCounters
from powerinfer_tools.engine.packed import PackedWeights
from powerinfer_tools.engine.recurrent_operations import RecurrentOperations
from powerinfer_tools.engine.values import Value
from powerinfer_tools.model.hyperparameter_types import PositionScale, Rope
from powerinfer_tools.model.operations import Activation, Attention, HeadPart
from powerinfer_tools.model.refused_operations import WithoutExperts
from powerinfer_tools.model.rotary import RotaryTables
from powerinfer_tools.model.tensors import Norm, Vector, Weight


@dataclass(frozen=True)
class Inputs:
    """The inputs set before each run: ids of the tokens, and their rows of the table of learnt positions."""

    tokens: Integers
    positions: Integers | None


@dataclass(frozen=True, eq=False)
class _Product:
    """A product that is not written yet."""

    matrix: Matrix
    source: Floats
    bias: Vector | None
    out: Value


class ProgramOperations(RecurrentOperations, WithoutExperts[Value]):
    """Appends operations to ``builder``. Matrices of the model are packed on first use; matrices that are
    already packed are taken as they are. :mod:`powerinfer_tools.engine.routed` writes experts, which are one
    operation of the kernels over all chosen experts."""

    place = "a program of single blocks"

    def __init__(
        self,
        builder: ProgramBuilder,
        scratch: Scratch,
        pool: Pool,
        tables: Mapping[Rope, RotaryTables],
        slots: Sequence[KVSlot | None],
        inputs: Inputs | None = None,
        growths: Mapping[PositionScale, Floats] | None = None,
        packed: PackedWeights | None = None,
    ) -> None:
        self._packed_matrices = PackedWeights() if packed is None else packed
        self._builder, self._scratch, self._pool, self._inputs = builder, scratch, pool, inputs
        self._tables, self._slots, self._growths = tables, slots, growths or {}
        self._waiting: list[_Product] = []
        self._rounded: set[int] = set()
        #: Bytes of the matrices in the products.
        self.weight_bytes = 0
        #: The counters that observe the next activation, and the thresholds below which it drops neurons.
        self.observed: LayerCounters | None = None
        self.thresholds: FactorThresholds | None = None

    def flush(self) -> ProgramBuilder:
        """Write the pending products. Code that appends to the program directly uses the builder returned
        here."""
        waiting, self._waiting = self._waiting, []
        for product in waiting:
            self._round(product)
        for index, product in enumerate(waiting):
            self._multiply(product, product.out.floats, independent=index + 1 < len(waiting))
        return self._builder

    def changed(self, floats: Floats) -> None:
        """Note that ``floats`` hold new values from here on."""
        self._rounded.discard(place(floats))

    def round(self, floats: Floats) -> None:
        """Quantise ``floats``, unless that was done since they last changed."""
        acts = self._scratch.copy(floats)
        if acts is not None and place(floats) not in self._rounded:
            self.flush().quantize(floats, acts)
            self._rounded.add(place(floats))

    def rounded(self, floats: Floats) -> Activations | None:
        """The buffer in which :meth:`round` leaves its result."""
        return self._scratch.copy(floats)

    def embed(self, name: str, table: Weight, scale: float) -> Value:
        """Rows are read from the file as it is."""
        assert self._inputs is not None
        x = self._scratch.named(name, table.columns)
        self._rows(table, self._inputs.tokens, x, scale)
        return Value(x)

    def embed_positions(self, x: Value, table: Weight, offset: int) -> Value:
        """The row numbers, ``offset`` included, are set before each run."""
        assert self._inputs is not None
        assert self._inputs.positions is not None
        rows = self._scratch.named("block_out", table.columns)
        self._rows(table, self._inputs.positions, rows, 1.0)
        return self.join(x, Value(rows))

    def norm(self, name: str, x: Value, norm: Norm, eps: float) -> Value:
        """In place if ``name`` is the name of ``x``."""
        builder, out = self.flush(), self._scratch.named(name, x.floats.shape[1])
        if norm.kind == "rms":
            builder.rms_norm(x.floats, norm.weight, out, eps)
            if norm.bias is not None:
                builder.add(norm.bias, out)
        else:
            builder.layer_norm(x.floats, norm.weight, norm.bias, out, eps)
        self.changed(out)
        return Value(out)

    def norm_heads(self, x: Value, heads: int, norm: Norm, eps: float) -> Value:
        """In place."""
        builder = self.flush()
        if norm.kind == "rms":
            assert norm.bias is None, "in no family"
            builder.rms_norm(x.floats, norm.weight, x.floats, eps, groups=heads)
        else:
            builder.layer_norm(x.floats, norm.weight, norm.bias, x.floats, eps, groups=heads)
        self.changed(x.floats)
        return x

    def linear(self, name: str, x: Value, weight: Weight | Matrix, bias: Vector | None = None) -> Value:
        """Noted until the next operation."""
        if self._waits(x):
            self.flush()
        matrix = weight if isinstance(weight, Matrix) else self._packed(weight)
        out = Value(self._scratch.named(name, matrix.rows))
        self._waiting.append(_Product(matrix, x.floats, bias, out))
        return out

    def rotate(self, x: Value, heads: int, head_dim: int, rope: Rope, first: int = 0) -> Value:
        """In place."""
        tables = self._tables[rope]
        self.flush().rope(x.floats, tables.cos, tables.sin, heads, head_dim, rope.style, first)
        self.changed(x.floats)
        return x

    def attend(self, query: Value, key: Value | None, value: Value | None, how: Attention) -> Value:
        """Over the cache of the layer."""
        builder, slot = self.flush(), self._slots[how.layer]
        assert slot is not None, "the attention of this layer is on the hot device"
        out = self._scratch.named("attended", how.heads * how.value_dim)
        if key is not None and value is not None:
            builder.store_kv(key.floats, value.floats, slot)
        builder.attention(
            query.floats,
            slot,
            out,
            how.heads,
            how.scale,
            window=how.window,
            chunk=how.chunk,
            softcap=how.softcap,
            sinks=how.sinks,
            slopes=alibi_slopes(how.heads, how.alibi).astype(np.float32) if how.alibi else None,
        )
        self.changed(out)
        return Value(out)

    def activate(self, gate: Value, up: Value | None, how: Activation) -> Value:
        """In place of ``gate``, after the counters have observed it."""
        builder, factor = self.flush(), None if up is None else up.floats
        if self.observed is not None:
            builder.observe(gate.floats, factor, how.kind, **vars(self.observed), cut=how.cut)
        if self.thresholds is not None and factor is not None:
            scores = self._scratch.named("scores", factor.shape[1])
            builder.activate(gate.floats, None, scores, how.kind)
            builder.keep_large(scores, self.thresholds.gate, factor)
            builder.keep_large(factor, self.thresholds.up, factor)
        if how.kind == "xielu":
            assert factor is None, "in no family"
            builder.xielu(gate.floats, *how.constants)
        else:
            builder.activate(gate.floats, factor, gate.floats, how.kind, how.cut)
        self.changed(gate.floats)
        return gate

    def combine(self, name: str, x: Value, factors: Value, width: int) -> Value:
        """Into the buffer of that name."""
        made = factors.floats.shape[1] * width // x.floats.shape[1]
        builder, out = self.flush(), self._scratch.named(name, made * width)
        builder.combine(x.floats, factors.floats, out, width)
        self.changed(out)
        return Value(out)

    def keep_top(self, x: Value, deviations: float) -> Value:
        """In place."""
        self.flush().keep_top(x.floats, x.floats, deviations)
        self.changed(x.floats)
        return x

    def clamp(self, x: Value, limit: float) -> Value:
        """In place."""
        self.flush().clamp(x.floats, -limit, limit)
        self.changed(x.floats)
        return x

    def copy(self, name: str, x: Value) -> Value:
        """Into the buffer of that name."""
        out = self._scratch.named(name, x.floats.shape[1])
        self.flush().copy(x.floats, out, x.floats.shape[1])
        self.changed(out)
        return Value(out)

    def join(self, x: Value, y: Value, factor: float = 1.0) -> Value:
        """In place of ``x``; a pending product is added as it is computed."""
        last = self._waiting[-1] if self._waiting else None
        if last is not None and last.out is y and factor == 1.0 and last.matrix.scale == 1.0:
            del self._waiting[-1]
            self.flush()
            self._round(last)
            self._multiply(last, x.floats, accumulate=True)
        else:
            self.flush().add(y.floats, x.floats, factor)
        self.changed(x.floats)
        return x

    def scale_by_position(self, x: Value, how: PositionScale) -> Value:
        """In place."""
        builder = self.flush()
        builder.scale_by_position(x.floats, self._growths[how])
        self.changed(x.floats)
        return x

    def scale(self, x: Value, factor: float) -> Value:
        """In place."""
        self.flush().scale(x.floats, factor)
        self.changed(x.floats)
        return x

    def softcap(self, x: Value, cap: float) -> Value:
        """In place."""
        self.flush().softcap(x.floats, cap)
        self.changed(x.floats)
        return x

    def per_head(self, name: str, x: Value, matrices: Sequence[Weight | Matrix], rest: int) -> Value:
        """Inputs of quantised matrices are rounded head by head."""
        packed = [one if isinstance(one, Matrix) else self._packed(one) for one in matrices]
        builder, rows, columns, heads = self.flush(), packed[0].rows, packed[0].columns, len(packed)
        out = self._scratch.named(name, heads * (rows + rest))
        steps = {"src_step": columns + rest, "out_step": rows + rest}
        builder.head_matmul(packed, x.floats, out, **steps)
        if rest:
            places = {"src_first": columns, "out_first": rows, "heads": heads, **steps}
            builder.copy(x.floats, out, rest, **places)
        self.changed(out)
        return Value(out)

    def gather_heads(self, name: str, heads: int, parts: Sequence[HeadPart[Value]]) -> Value:
        """Copies."""
        builder, width, first = self.flush(), sum(part.count for part in parts), 0
        out = self._scratch.named(name, heads * width)
        for part in parts:
            places = {"src_first": part.first, "src_step": part.step, "out_first": first, "out_step": width}
            builder.copy(part.value.floats, out, part.count, heads=heads, **places)
            first += part.count
        self.changed(out)
        return Value(out)

    def replace_first(self, x: Value, y: Value) -> Value:
        """In place of ``x``."""
        self.flush().copy(y.floats, x.floats, y.floats.shape[1])
        self.changed(x.floats)
        return x

    def _waits(self, x: Value) -> bool:
        return any(place(product.out.floats) == place(x.floats) for product in self._waiting)

    def _round(self, product: _Product) -> None:
        """Quantise the input of a product, if its matrix needs that."""
        acts = self._scratch.copy(product.source)
        if product.matrix.row_type.is_float or acts is None or place(product.source) in self._rounded:
            return
        self._builder.quantize(product.source, acts)
        self._rounded.add(place(product.source))

    def _multiply(
        self, product: _Product, out: Floats, *, accumulate: bool = False, independent: bool = False
    ) -> None:
        self._builder.matmul(
            product.matrix,
            product.source,
            self._scratch.copy(product.source),
            out,
            bias=product.bias,
            accumulate=accumulate,
            independent=independent,
        )
        self.changed(out)

    def _rows(self, table: Weight, index: Integers, out: Floats, scale: float) -> None:
        self.flush().embed(index, table.data, table.row_type, table.rows, table.columns, out, scale=scale)
        self.changed(out)

    def _packed(self, weight: Weight) -> Matrix:
        matrix = self._packed_matrices.of(self._pool, weight)
        self.weight_bytes += matrix.nbytes
        return matrix
