"""Memory of a model at work, to the byte: what every unit takes in RAM and in VRAM.

The counts follow the engine: matrices packed as tiles of 16 rows, neurons of both sides as rows without
padding, experts as whole matrices with the bits of the source (tiles in RAM, plain rows in VRAM), a KV cache
of the type that is asked for, allocated for the whole context, and scratch for one batch of tokens. Not in
the budgets: code, Python itself, the CUDA context, and pages of the mapped model file, which the system can
drop at any time.
"""

from dataclasses import dataclass

from powerinfer_formats.block_types import TensorType
from powerinfer_kernels import packed_row_bytes
from powerinfer_tools.model.counting import HEAD_ROWS, KeyValues, KVType
from powerinfer_tools.model.device_memory import (
    ExpertWidths,
    Widths,
    attention_scratch_bytes,
    experts_scratch_bytes,
    head_scratch_bytes,
    neuron_scratch_bytes,
    predictor_scratch_bytes,
    router_scratch_bytes,
)
from powerinfer_tools.model.matrices import FLOAT_TYPES, MatrixShape
from powerinfer_tools.model.outline import body_footprint, head_footprint
from powerinfer_tools.model.shapes import ExpertsShape, LayerShape, ModelShape

_F32 = 4
_LINE = 64
#: Bits of a code of the row types whose columns can be left out.
_CODE_BITS = {
    TensorType.Q4_0: 4,
    TensorType.Q4_1: 4,
    TensorType.Q4_K: 4,
    TensorType.Q5_0: 5,
    TensorType.Q5_1: 5,
    TensorType.Q5_K: 5,
    TensorType.Q6_K: 6,
    TensorType.Q8_0: 8,
}


@dataclass(frozen=True)
class RequestSize:
    """What a user asks for: tokens of prompt, processed ``batch`` at a time, and tokens that are
    generated."""

    prompt: int = 0
    generate: int = 1
    batch: int = 512

    @property
    def passes(self) -> int:
        """Batches of the prompt."""
        return -(-self.prompt // self.batch)


#: No prompt.
TOKENS_ALONE = RequestSize()


@dataclass(frozen=True)
class Workload:
    """What the memory is for: ``context`` positions in a KV cache of ``kv_type``, prompts in pieces of
    ``batch`` tokens."""

    context: int
    batch: int = 512
    kv_type: KVType = "f16"


@dataclass(frozen=True)
class SideBytes:
    """What the same weights take on either side, bytes."""

    vram: int
    ram: int


def side_bytes(matrices: tuple[MatrixShape, ...]) -> SideBytes:
    """Of whole matrices."""
    return SideBytes(sum(m.nbytes for m in matrices), sum(m.packed_nbytes for m in matrices))


def expert_bytes(layer: LayerShape) -> SideBytes:
    """Of one expert that a router chooses."""
    return side_bytes(layer.ffn)


def picked_padding(layer: LayerShape) -> int:
    """By how many bytes an expert is larger where its neurons can be left out: up rows, and the codes of each
    column of the down projection, fill whole cache lines."""
    down, padding = layer.down, 0
    if layer.gate is not None:
        up = layer.up
        padding = up.rows * _lines(packed_row_bytes(up.row_type, up.columns)) - up.packed_nbytes
    codes = down.rows * _CODE_BITS[down.row_type] // 8
    return padding + down.columns * (_lines(codes) - codes)


def down_codes(layer: LayerShape) -> int:
    """Bytes of the codes of an expert's down projection, without its scales."""
    return layer.down.columns * layer.down.rows * _CODE_BITS[layer.down.row_type] // 8


def _lines(nbytes: int) -> int:
    return -(-nbytes // _LINE) * _LINE


def shared_bytes(layer: LayerShape) -> SideBytes:
    """Of the shared expert; nothing where there is none."""
    return side_bytes(experts_of(layer).shared)


def router_bytes(layer: LayerShape) -> SideBytes:
    """Of the router and the shared expert's weight, which are where the layer's attention is; nothing without
    experts."""
    return SideBytes(0, 0) if layer.experts is None else side_bytes(layer.experts.router)


def unit_bytes(layer: LayerShape) -> int:
    """VRAM of the smallest unit of a layer that can be placed."""
    sizes = [expert_bytes(layer).vram, shared_bytes(layer).vram]
    return min(size for size in sizes if size)


def experts_of(layer: LayerShape) -> ExpertsShape:
    """The experts of a layer that has some."""
    assert layer.experts is not None
    return layer.experts


def key_values(shape: ModelShape, layer: LayerShape | None = None) -> KeyValues:
    """What a layer keeps of each position."""
    return KeyValues(shape.kv_heads, shape.head_dim, shape.head_dim, layer.window if layer else 0)


def kv_cache_bytes(shape: ModelShape, workload: Workload) -> int:
    """Bytes of the KV cache of one layer; keys in tiles of 16 positions."""
    return key_values(shape).tiled_nbytes(workload.context, workload.kv_type)


def attention_bytes(layer: LayerShape) -> int:
    """Bytes of one attention block (packed matrices) with the layer's norms and biases."""
    return sum(matrix.packed_nbytes for matrix in layer.attention) + layer.vector_bytes


def embedding_bytes(shape: ModelShape) -> int:
    """Bytes of the token embedding, and of learned positions where the model has them."""
    return shape.embedding.file_nbytes + shape.position_bytes


def output_norm_bytes(shape: ModelShape) -> int:
    """Bytes of the final norm (F32)."""
    return _F32 * shape.width


def cpu_scratch_bytes(shape: ModelShape, batch: int) -> int:
    """Activations of one batch on the CPU side, with the hot side's part of a layer, and of the head."""
    body, head = body_footprint(shape), head_footprint(shape)
    return batch * (body.token_bytes + _F32 * shape.width) + HEAD_ROWS * head.token_bytes


def rotary_bytes(shape: ModelShape, context: int) -> int:
    """Cosines and sines (F32) of half of the rotary dimensions for every position; twice where some layers
    look back over a window only, since those have a base of their own."""
    return body_footprint(shape).table_bytes_of(context)


def predicted_scratch_bytes(shape: ModelShape, batch: int) -> int:
    """Scores of all neurons for one batch: what mode predicted needs on the CPU side, once for all layers."""
    return _F32 * batch * shape.most_neurons


def gpu_scratch_bytes(shape: ModelShape, batch: int) -> int:
    """Scratch of the hot side for neurons and for experts: see
    :mod:`~powerinfer_tools.model.device_memory`."""
    neurons = neuron_scratch_bytes(shape.width, shape.most_neurons, batch) if shape.ffn_layers else 0
    experts = [(layer, layer.experts) for layer in shape.layers if layer.experts is not None]
    if not experts:
        return neurons
    products = [m for layer, some in experts for m in (*layer.ffn[:-1], *some.shared[:-1])]
    widths = ExpertWidths(
        width=shape.width,
        neurons=max(max(layer.up.rows, some.shared_neurons) for layer, some in experts),
        inputs=len({matrix.row_type in FLOAT_TYPES for matrix in products}),
        taken=max(some.used for _, some in experts) + 1,
    )
    return neurons + experts_scratch_bytes(widths, batch)


def gpu_attention_scratch_bytes(shape: ModelShape, workload: Workload) -> int:
    """What the hot side needs once as soon as it has an attention block: scratch, also that of routers, and
    rotary tables."""
    tables, routed = rotary_bytes(shape, workload.context), 0
    for layer in shape.expert_layers[:1]:
        routed = router_scratch_bytes(shape.width, experts_of(layer).count, workload.batch)
    scratch = attention_scratch_bytes(_widths(shape), workload.batch, workload.context)
    return tables + scratch + routed


def gpu_predictor_scratch_bytes(shape: ModelShape, batch: int) -> int:
    """What the hot side needs once as soon as it has a predictor."""
    return predictor_scratch_bytes(shape.width, shape.most_neurons, batch)


def gpu_attention_bytes(layer: LayerShape) -> int:
    """Bytes of one attention block on the hot side, whose rows are not padded."""
    return sum(matrix.nbytes for matrix in layer.attention) + layer.vector_bytes


def gpu_cache_bytes(shape: ModelShape, workload: Workload) -> int:
    """Bytes of the KV cache of one layer on the hot side."""
    return key_values(shape).nbytes(workload.context, workload.kv_type)


def gpu_head_bytes(shape: ModelShape, batch: int) -> int:
    """Bytes of the head on the hot side, with its norm (which may have a bias) and its own scratch."""
    scratch = head_scratch_bytes(_widths(shape), batch)
    return shape.head.nbytes + 2 * output_norm_bytes(shape) + scratch


def _widths(shape: ModelShape) -> Widths:
    query, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return Widths(shape.width, query, keys, shape.heads, shape.vocabulary)


def fixed_ram_bytes(shape: ModelShape, workload: Workload, *, predicted: bool) -> dict[str, int]:
    """RAM of the units that always stay on the CPU, by name; ``predicted``: with room for predictors'
    scores."""
    scores = predicted_scratch_bytes(shape, workload.batch) if predicted else 0
    return {
        "embedding": embedding_bytes(shape),
        "output_norm": output_norm_bytes(shape),
        "rotary_tables": rotary_bytes(shape, workload.context),
        "scratch": cpu_scratch_bytes(shape, workload.batch) + scores,
    }
