"""Split files of ReLU models with random weights, in which a chosen share of neurons fires.

The first block of the residual stream is constant: every embedding has ones there, and what attention and
FFN add is too small to move it. A gate row has −shift spread over that block, and its product with the rest
of the normalised input is about N(0, 1), so that the neuron fires for a share Φ(−shift) of all tokens. An FFN
without gate has biases: there, the shift is subtracted by the up row's, and the residual stream may be any.

Gates are a product of two small matrices and some noise, and those matrices are the predictors: of the size
of trained ones and about as good. That matters for speed, since more is read of named neurons that fire than
of those that do not.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from powerinfer_formats.gguf_writer import GGUFWriter
from powerinfer_formats.split_layout import (
    ALIGNMENT,
    BundleLayout,
    SplitHeader,
    SplitPrediction,
    bias_name,
    bundle_layout,
    bundle_name,
    declare_split_layer,
    order_name,
    predictor_names,
)
from powerinfer_formats.split_predictors import declare_low_rank
from powerinfer_kernels import WRITTEN_TYPES, RowType, dequantize, quantize
from powerinfer_tools import __version__
from powerinfer_tools.errors import ModelError
from powerinfer_tools.measure.synthetic import models
from powerinfer_tools.measure.synthetic.models import Tensor, add_metadata, tensors_of
from powerinfer_tools.measure.synthetic.random_blocks import BALANCED, BLOCKS, balance
from powerinfer_tools.measure.synthetic.shapes import Shape

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float64]
#: Row types whose first block can be set, because this program quantises to them.
SPARSE_TYPES = tuple(row_type.name for row_type in WRITTEN_TYPES)
#: Columns of the constant block.
_BLOCK = 32
#: Deviation of what one block of attention or FFN adds to a residual stream of deviation 1.
_ADDED = 0.01
#: Tensors of what mixes tokens otherwise than by attention: as in models whose activation makes the zeros.
_MIXING = (".ssm_", ".time_mix_", ".channel_mix_lerp")
_GROUP = 64
_ROWS_AT_ONCE = 1024
_RAREST = 1e-4
#: Weights of a predictor as a share of its layer's.
PREDICTOR_SHARE = 0.07
#: How many neurons a predictor names, over those that fire: it finds 97 % of them at a density of 0.1.
OVERSHOOT = 1.25
#: Standard deviation of the part of a gate that a predictor does not see, relative to the part that it sees.
_UNSEEN = 0.15


@dataclass(frozen=True)
class Sparsity:
    """``density``: mean share of neurons that fire for a token. ``skew``: 0 when all neurons fire equally
    often; the larger, the more they differ (firing rates are drawn from a beta distribution of that mean
    with parameters that add up to 1 / skew)."""

    density: float
    skew: float = 0.0

    def rates(self, rng: np.random.Generator, neurons: int) -> Floats:
        """Firing rates of the neurons, the busiest first."""
        rates = np.full(neurons, self.density)
        if self.skew:
            rates = rng.beta(self.density / self.skew, (1 - self.density) / self.skew, neurons)
        return np.sort(np.clip(rates, _RAREST, 1 - _RAREST))[::-1]


def write_sparse(
    path: Path, name: str, shape: Shape, row_type: str, sparsity: Sparsity, seed: int = 0
) -> int:
    """Write the split file and return its size in bytes.

    Raises ModelError for a type or a density that cannot be made, FormatError or OSError where writing fails.
    """
    if shape.spec.inner_norms:
        raise ModelError(
            f"sparse synthetic models are split files, and {name} has norms inside of its FFNs, of which "
            "there are none; without --density, its own activation makes zeros"
        )
    if row_type not in SPARSE_TYPES:
        raise ModelError(
            f"sparse synthetic models come in {', '.join(SPARSE_TYPES)}, not in {row_type}: gate rows are "
            "quantised here, to set how often they fire"
        )
    if not 0 < sparsity.density < 1 or not sparsity.skew >= 0:
        raise ModelError(
            f"density {sparsity.density} must lie between 0 and 1, skew {sparsity.skew} not below 0"
        )
    rng = np.random.Generator(np.random.SFC64(seed))
    kind = RowType[row_type]
    layout = bundle_layout(int(kind) if shape.spec.gated else None, int(kind), int(kind), shape.width)
    up, down = shape.spec.ffn_names
    in_bundles = (".ffn_gate.weight", f".{up}.weight", f".{up}.bias", f".{down}.weight")
    others = [tensor for tensor in tensors_of(shape, row_type) if not tensor.name.endswith(in_bundles)]
    rank = predictor_rank(shape)
    with GGUFWriter(path, alignment=ALIGNMENT) as writer:
        add_metadata(writer, f"{name}, ReLU", shape, row_type)
        _header(shape, layout).write(writer)
        for tensor in others:
            writer.declare(tensor.name, BLOCKS[tensor.row_type].code, tensor.shape)
        for layer in shape.fed:
            declare_split_layer(
                writer, layer, layout, neurons=shape.neurons, hot=0, bias=not shape.spec.gated
            )
            declare_low_rank(
                writer, layer, (int(kind), int(kind)), width=shape.width, neurons=shape.neurons, rank=rank
            )
        for tensor in others:
            for piece in _pieces(rng, shape, tensor):
                writer.write(tensor.name, piece)
        for layer in shape.fed:
            _write_layer(writer, layer, rng, shape, row_type, layout, sparsity)
    return path.stat().st_size


def predictor_rank(shape: Shape) -> int:
    """The rank, in whole blocks, at which a predictor has :data:`PREDICTOR_SHARE` of its layer's weights."""
    attention = 2 * (shape.heads + shape.kv_heads) * shape.head_dim * shape.width
    weights = attention + (3 if shape.spec.gated else 2) * shape.neurons * shape.width
    return max(1, round(PREDICTOR_SHARE * weights / (shape.width + shape.neurons) / _BLOCK)) * _BLOCK


@dataclass(frozen=True)
class _Factors:
    """The matrices of a predictor, as rows of ``row_type``: ``inward`` (rank, width), which does not see the
    constant block, and ``outward`` (neurons, rank). ``deviations`` [neurons] are those of its scores: inputs
    are about N(0, 1)."""

    row_type: RowType
    inward: Bytes
    outward: Bytes
    deviations: Floats
    inward_values: NDArray[np.float32]

    def threshold(self, rates: Floats) -> NDArray[np.float32]:
        """What scores pass at each of these rates."""
        return (_upper_quantiles(rates) * self.deviations).astype(np.float32)

    def gates(self, rng: np.random.Generator, first: int, count: int) -> NDArray[np.float32]:
        """Gate rows of ``count`` neurons from ``first`` on, (count, width): products of deviation 1, most of
        which the predictor sees."""
        (rank, width), rows = self.inward_values.shape, slice(first, first + count)
        outward = dequantize(self.outward[rows], self.row_type, count, rank)
        projected = (outward / self.deviations[rows, None].astype(np.float32)) @ self.inward_values
        unseen = rng.standard_normal((count, width), dtype=np.float32) * np.float32(width**-0.5)
        return np.asarray((projected + _UNSEEN * unseen) / (1 + _UNSEEN**2) ** 0.5, np.float32)


def _write_layer(
    writer: GGUFWriter,
    layer: int,
    rng: np.random.Generator,
    shape: Shape,
    row_type: str,
    layout: BundleLayout,
    sparsity: Sparsity,
) -> None:
    rates = sparsity.rates(rng, shape.neurons)
    shifts = _upper_quantiles(rates)
    factors = _factors(rng, shape, row_type)
    writer.write(order_name(layer), np.arange(shape.neurons, dtype=np.int32))
    if not shape.spec.gated:
        writer.write(bias_name(layer), (-shifts).astype(np.float32))
    for records in _records(rng, shape, row_type, layout, sparsity.density, shifts, factors):
        writer.write(bundle_name(layer), records)
    names = predictor_names(layer)
    writer.write(names[0], factors.inward)
    writer.write(names[1], factors.outward)
    writer.write(names[2], factors.threshold(np.minimum(OVERSHOOT * rates, 1 - _RAREST)))


def _factors(rng: np.random.Generator, shape: Shape, row_type: str) -> _Factors:
    rank, kind = predictor_rank(shape), RowType[row_type]
    inward = _random(rng, row_type, rank, shape.width, shape.width**-0.5)
    _set_first_block(inward, row_type, np.zeros(rank))
    outward = _random(rng, row_type, shape.neurons, rank, rank**-0.5)
    values = dequantize(inward, kind, rank, shape.width)
    # The squared norm of each row of outward · inward, without making that.
    left, square = dequantize(outward, kind, shape.neurons, rank), values @ values.T
    norms = np.sqrt(((left @ square) * left).sum(axis=1, dtype=np.float64))
    return _Factors(kind, inward, outward, norms, values)


def _header(shape: Shape, layout: BundleLayout) -> SplitHeader:
    fed = [layer in shape.fed for layer in range(shape.layers)]
    return SplitHeader(
        source_fingerprint="0" * 64,
        activation="relu",
        group=_GROUP,
        hot_neurons=(0,) * shape.layers,
        modes=tuple("gate-first" if one else "dense" for one in fed),
        types=tuple(layout.types if one else () for one in fed),
        requantization_error=(0.0,) * shape.layers,
        tool_version=__version__,
        prediction=SplitPrediction(tuple("low-rank" if one else "none" for one in fed), (), ()),
    )


def _random(rng: np.random.Generator, row_type: str, rows: int, columns: int, deviation: float) -> Bytes:
    block = BLOCKS[row_type]
    if row_type != "Q4_0":
        return block.make(rng, rows * (columns // block.values), deviation).reshape(rows, -1)
    blocks = block.make(rng, rows * (columns // block.values), deviation / BALANCED).reshape(rows, -1)
    balance(blocks)
    return blocks


def _set_first_block(rows: Bytes, row_type: str, values: Floats) -> None:
    """Every value of row i's first 32 columns becomes ``values[i]``."""
    block = np.repeat(values[:, None], _BLOCK, axis=1).astype(np.float32)
    first = quantize(block, RowType[row_type])
    rows[:, : first.shape[1]] = first


def _pieces(rng: np.random.Generator, shape: Shape, tensor: Tensor) -> Iterator[NDArray[np.generic]]:
    if any(name in tensor.name for name in _MIXING):
        yield from models.pieces(rng, shape, tensor)
        return
    if len(tensor.shape) == 1:
        yield np.zeros(tensor.shape[0], np.float32) + (not tensor.name.endswith(".bias"))
        return
    rows, columns = tensor.shape
    is_embedding = tensor.name == "token_embd.weight"
    deviation = 1.0 if is_embedding else columns**-0.5
    if ".attn_output." in tensor.name:
        deviation *= _ADDED
    for first in range(0, rows, _ROWS_AT_ONCE):
        count = min(_ROWS_AT_ONCE, rows - first)
        piece = _random(rng, tensor.row_type, count, columns, deviation)
        if is_embedding and shape.spec.gated:
            _set_first_block(piece, tensor.row_type, np.ones(count))
        yield piece


def _records(
    rng: np.random.Generator,
    shape: Shape,
    row_type: str,
    layout: BundleLayout,
    density: float,
    shifts: Floats,
    factors: _Factors,
) -> Iterator[Bytes]:
    width, active = shape.width, max(1.0, density * shape.neurons)
    for first in range(0, shape.neurons, _ROWS_AT_ONCE):
        some = shifts[first : first + _ROWS_AT_ONCE]
        first_rows = quantize(factors.gates(rng, first, len(some)), RowType[row_type])
        rows = [first_rows]
        if shape.spec.gated:
            _set_first_block(first_rows, row_type, -some / _BLOCK)
            rows.append(_random(rng, row_type, len(some), width, width**-0.5))
        rows.append(_random(rng, row_type, len(some), width, _ADDED * active**-0.5))
        yield layout.pack(*rows)


def _upper_quantiles(rates: Floats) -> Floats:
    """What a value of N(0, 1) exceeds at each of these rates."""
    normal = NormalDist()
    return np.array([-normal.inv_cdf(rate) for rate in rates])
