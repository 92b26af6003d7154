"""What runs along the layers beside the residual stream, in Gemma 3n and Gemma 4: an input for every layer,
and further streams, which a layer predicts before it begins and corrects when it has ended (AltUp, arXiv
2301.13310).

Weights, and the blocks in the vocabulary of :mod:`powerinfer_tools.model.operations`.
"""

import math
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from powerinfer_kernels import RowType
from powerinfer_tools.model.hyperparameter_types import StreamSizes
from powerinfer_tools.model.operations import Activation, HeadPart, Operations
from powerinfer_tools.model.tensors import Norm, Tensors, Vector, Weight

V = TypeVar("V")
_GELU = Activation("gelu_tanh")
#: What a sum of squares is at least before a vector is divided by its length.
_TINY = 1e-12


@dataclass(frozen=True)
class InputTable:
    """Inputs of all layers: those of a token are a row of ``table`` (vocabulary, layers · size), to which the
    embedding's product with ``project`` (layers · size, width) is added, normalised for each layer."""

    table: Weight
    project: Weight
    norm: Norm
    layers: int


@dataclass(frozen=True)
class LayerInput:
    """What a layer adds at its end: ``project`` (width, size) · (gelu(``gate`` (size, width) · x) · its
    input), normalised. With streams, x is times ``scale`` (width,) before."""

    index: int
    gate: Weight
    project: Weight
    norm: Norm
    scale: Vector | None


@dataclass(frozen=True)
class Streams:
    """``count`` streams, of which layers read the one at ``active``; the others begin as ``enter`` of the
    embedding, and end through ``leave``, (width, width) each, as long as the first one is. ``ones`` (1,
    width) adds up."""

    enter: tuple[Weight, ...]
    leave: tuple[Weight, ...]
    ones: Weight
    sizes: StreamSizes


@dataclass(frozen=True)
class LayerStreams:
    """How a layer predicts and corrects the streams: ``router`` (count, width) reads the active one,
    normalised; ``predict`` (count², count) and ``correct`` (count, count) make factors of that."""

    router: Weight
    router_norm: Norm
    predict: Weight
    correct: Weight
    sizes: StreamSizes


@dataclass(frozen=True)
class Laurel:
    """Learnt augmented residual (arXiv 2411.07501): ``high`` (width, rank) · ``low`` (rank, width) of what
    attention reads, normalised, and that itself."""

    low: Weight
    high: Weight
    norm: Norm


@dataclass
class Along(Generic[V]):
    """The values as they are at a point of the pass: ``inputs`` (T, layers · size), ``streams`` (T, count ·
    width), and those that the present layer has ``predicted``; ``first_value``: the values of the first
    layer, which RWKV-7's later layers mix into theirs; ``embedding``: what the residual stream began as,
    where layers add it again."""

    inputs: V | None = None
    streams: V | None = None
    predicted: V | None = None
    first_value: V | None = None
    embedding: V | None = None


def read_input_table(tensors: Tensors, size: int, layers: int, vocabulary: int, width: int) -> InputTable:
    """Raises FormatError and ModelError."""
    return InputTable(
        table=tensors.matrix("per_layer_token_embd.weight", vocabulary, layers * size),
        project=tensors.matrix("per_layer_model_proj.weight", layers * size, width),
        norm=Norm("rms", tensors.vector("per_layer_proj_norm.weight", size)),
        layers=layers,
    )


def read_layer_input(tensors: Tensors, index: int, size: int, width: int, *, scaled: bool) -> LayerInput:
    """Raises FormatError and ModelError."""
    prefix = f"blk.{index}"
    return LayerInput(
        index=index,
        gate=tensors.matrix(f"{prefix}.inp_gate.weight", size, width),
        project=tensors.matrix(f"{prefix}.proj.weight", width, size),
        norm=Norm("rms", tensors.vector(f"{prefix}.post_norm.weight", width)),
        scale=tensors.vector(f"{prefix}.altup_correct_scale.weight", width) if scaled else None,
    )


def read_streams(tensors: Tensors, sizes: StreamSizes, width: int) -> Streams:
    """Raises FormatError and ModelError."""
    others = sizes.count - 1
    return Streams(
        enter=tensors.heads("altup_proj.weight", others, width, width),
        leave=tensors.heads("altup_unembd_proj.weight", others, width, width),
        ones=Weight("ones", RowType.F32, 1, width, np.ones(width, np.float32).view(np.uint8)),
        sizes=sizes,
    )


def read_layer_streams(tensors: Tensors, sizes: StreamSizes, width: int, prefix: str) -> LayerStreams:
    """Raises FormatError and ModelError."""
    count = sizes.count
    return LayerStreams(
        router=tensors.matrix(f"{prefix}.altup_router.weight", count, width),
        router_norm=Norm("rms", tensors.vector(f"{prefix}.altup_router_norm.weight", width)),
        predict=tensors.matrix(f"{prefix}.altup_predict_coef.weight", count * count, count),
        correct=tensors.matrix(f"{prefix}.altup_correct_coef.weight", count, count),
        sizes=sizes,
    )


def read_laurel(tensors: Tensors, width: int, prefix: str) -> Laurel:
    """Raises FormatError and ModelError."""
    rank = tensors.shape(f"{prefix}.laurel_l.weight")[0]
    return Laurel(
        low=tensors.matrix(f"{prefix}.laurel_l.weight", rank, width),
        high=tensors.matrix(f"{prefix}.laurel_r.weight", width, rank),
        norm=Norm("rms", tensors.vector(f"{prefix}.laurel_post_norm.weight", width)),
    )


def layer_inputs(ops: Operations[V, Weight], w: InputTable, x: V, eps: float) -> V:
    """The inputs of all layers; ``x`` is the embedding."""
    size, width = w.norm.weight.size, w.project.columns
    inputs = ops.embed("layer_inputs", w.table, math.sqrt(size))
    projected = ops.scale(ops.linear("projected_inputs", x, w.project), 1 / math.sqrt(width))
    projected = ops.norm_heads(projected, w.layers, w.norm, eps)
    return ops.scale(ops.join(inputs, projected), 1 / math.sqrt(2))


def begin(ops: Operations[V, Weight], w: Streams, x: V) -> V:
    """All streams, of which the embedding ``x`` is the first."""
    width = w.ones.columns
    length, parts = _length(ops, w, x), [HeadPart(x, 0, 0, width)]
    for index, matrix in enumerate(w.enter):
        entering = _as_long_as(ops, length, ops.linear(f"entering_{index}", x, matrix), width)
        parts.append(HeadPart(entering, 0, 0, width))
    return ops.gather_heads("streams", 1, parts)


def end(ops: Operations[V, Weight], w: Streams, streams: V) -> V:
    """The residual stream after the last layer: the mean of all streams."""
    width = w.ones.columns
    x = ops.part("x", streams, 0, width)
    length, leaving = _length(ops, w, x), []
    for index, matrix in enumerate(w.leave):
        one = ops.part("stream", streams, (index + 1) * width, width)
        leaving.append(_as_long_as(ops, length, ops.linear(f"entering_{index}", one, matrix), width))
    for one in leaving:
        x = ops.join(x, one)
    return ops.scale(x, 1 / w.sizes.count)


def predict(ops: Operations[V, Weight], w: LayerStreams, streams: V, eps: float) -> V:
    """What a layer expects of each stream: itself, and a mixture of all."""
    width, count = w.router.columns, w.sizes.count
    active = ops.part("active", streams, w.sizes.active * width, width)
    factors = ops.linear("stream_factors", _modalities(ops, w, active, eps), w.predict)
    factors = ops.plus(factors, np.eye(count, dtype=np.float32).ravel())
    return ops.combine("predicted", streams, factors, width)


def correct(ops: Operations[V, Weight], w: LayerStreams, predicted: V, x: V, eps: float) -> V:
    """The streams after a layer that has made ``x`` of the active one: each gets its part of the
    difference."""
    width = w.router.columns
    factors = ops.linear("stream_factors", _modalities(ops, w, x, eps), w.correct)
    factors = ops.plus(factors, np.ones(w.sizes.count, np.float32))
    active = ops.part("active", predicted, w.sizes.active * width, width)
    change = ops.join(ops.copy("change", x), active, -1.0)
    return ops.join(ops.combine("streams", change, factors, width), predicted)


def add_to_others(ops: Operations[V, Weight], w: LayerStreams, streams: V, added: V) -> V:
    """All streams but the first plus ``added``."""
    width, count = w.router.columns, w.sizes.count
    spread = ops.gather_heads("predicted", count, [HeadPart(added, 0, 0, width)])
    spread = ops.times(spread, np.array([0.0] + [1.0] * (count - 1), np.float32), width)
    return ops.join(streams, spread)


def input_block(ops: Operations[V, Weight], w: LayerInput, inputs: V, x: V, eps: float) -> V:
    """What a layer adds for its input."""
    size = w.gate.rows
    own = ops.part("layer_input", inputs, w.index * size, size)
    gate = ops.activate(ops.linear("input_gate", x, w.gate), own, _GELU)
    return ops.norm("block_out", ops.linear("block_out", gate, w.project), w.norm, eps)


def laurel(ops: Operations[V, Weight], w: Laurel, normed: V, out: V, eps: float) -> V:
    """``out`` with what is added beside attention."""
    beside = ops.linear("laurel", ops.linear("laurel_low", normed, w.low), w.high)
    return ops.join(ops.join(out, ops.norm("laurel", beside, w.norm, eps)), normed)


def _modalities(ops: Operations[V, Weight], w: LayerStreams, x: V, eps: float) -> V:
    normed = ops.norm("stream_input", x, w.router_norm, eps)
    normed = ops.scale(normed, 1 / w.router.columns)
    return ops.softcap(ops.linear("modalities", normed, w.router), 1.0)


def _length(ops: Operations[V, Weight], w: Streams, x: V) -> V:
    """The length of each x, (T, 1): its product with what is as long as one and points the same way."""
    unit = ops.unit_heads(ops.copy("active", x), 1, _TINY)
    return ops.linear("length", ops.times(unit, x), w.ones)


def _as_long_as(ops: Operations[V, Weight], length: V, x: V, width: int) -> V:
    return ops.times(ops.unit_heads(x, 1, _TINY), length, width)
