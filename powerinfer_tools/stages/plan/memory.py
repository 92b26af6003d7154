"""Memory of a model at work, to the byte: what every unit takes in RAM and in VRAM.

The counts follow the engine: matrices packed as tiles of 16 rows, neurons of both sides as rows without
padding, a KV cache of the type that is asked for, allocated for the whole context, and scratch for one batch
of tokens. Not in the budgets: code, Python itself, the CUDA context, and pages of the mapped model file,
which the system can drop at any time.
"""

from dataclasses import dataclass

from powerinfer_tools.engine.hot import sizes
from powerinfer_tools.model.counting import HEAD_ROWS, KeyValues, KVType
from powerinfer_tools.model.outline import body_footprint, head_footprint
from powerinfer_tools.model.shapes import LayerShape, ModelShape
from powerinfer_tools.stages.plan.expert_memory import hot_scratch_bytes

_F32 = 4


@dataclass(frozen=True)
class Workload:
    """What the memory is for: ``context`` positions in a KV cache of ``kv_type``, prompts in pieces of
    ``batch`` tokens."""

    context: int
    batch: int = 512
    kv_type: KVType = "f16"


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
    return _F32 * batch * max(layer.neurons for layer in shape.layers)


def gpu_scratch_bytes(shape: ModelShape, batch: int) -> int:
    """Scratch of the hot side for neurons: see :func:`~.sizes.neuron_scratch_bytes`."""
    if shape.routed:
        return hot_scratch_bytes(shape, batch)
    return sizes.neuron_scratch_bytes(shape.width, max(layer.neurons for layer in shape.layers), batch)


def gpu_attention_scratch_bytes(shape: ModelShape, workload: Workload) -> int:
    """What the hot side needs once as soon as it has an attention block: scratch, also that of routers, and
    rotary tables."""
    experts, tables = shape.layers[0].experts, rotary_bytes(shape, workload.context)
    routed = 0 if experts is None else sizes.router_scratch_bytes(shape.width, experts.count, workload.batch)
    scratch = sizes.attention_scratch_bytes(_widths(shape), workload.batch, workload.context)
    return tables + scratch + routed


def gpu_predictor_scratch_bytes(shape: ModelShape, batch: int) -> int:
    """What the hot side needs once as soon as it has a predictor."""
    neurons = max(layer.neurons for layer in shape.layers)
    return sizes.predictor_scratch_bytes(shape.width, neurons, batch)


def gpu_attention_bytes(layer: LayerShape) -> int:
    """Bytes of one attention block on the hot side, whose rows are not padded."""
    return sum(matrix.nbytes for matrix in layer.attention) + layer.vector_bytes


def gpu_cache_bytes(shape: ModelShape, workload: Workload) -> int:
    """Bytes of the KV cache of one layer on the hot side."""
    return key_values(shape).nbytes(workload.context, workload.kv_type)


def gpu_head_bytes(shape: ModelShape, batch: int) -> int:
    """Bytes of the head on the hot side, with its norm (which may have a bias) and its own scratch."""
    scratch = sizes.head_scratch_bytes(_widths(shape), batch)
    return shape.head.nbytes + 2 * output_norm_bytes(shape) + scratch


def _widths(shape: ModelShape) -> sizes.Widths:
    query, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return sizes.Widths(shape.width, query, keys, shape.heads, shape.vocabulary)


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
