"""A model that consists of sizes alone, so that its blocks can be traversed without a file."""

import numpy as np

from powerinfer_kernels import RowType
from powerinfer_tools.model.architectures import ArchitectureSpec
from powerinfer_tools.model.counting import Counted, CountingOperations, Footprint
from powerinfer_tools.model.ffn_matrices import DenseFFN, ExpertsFFN
from powerinfer_tools.model.footprint import layer_footprint
from powerinfer_tools.model.hyperparameter_types import Hyperparameters, LayerFacts, Rope, Routing
from powerinfer_tools.model.layer_weights import AttentionWeights, LayerWeights
from powerinfer_tools.model.matrices import MatrixShape
from powerinfer_tools.model.shapes import LayerShape, ModelShape
from powerinfer_tools.model.tensors import Norm, Stack, Weight

_NOTHING = np.empty(0, np.uint8)
#: Families differ in their computations, not in the sizes of their buffers and matrices.
_SPEC = ArchitectureSpec("outline", rope_style="norm")


def body_footprint(shape: ModelShape) -> Footprint:
    """Embedding and layers of ``shape``, counted as in a model, but without norms and biases."""
    if shape.counted is not None:
        return shape.counted.body
    ops = CountingOperations()
    ops.tokens(with_positions=shape.position_bytes > 0)
    ops.made("x", shape.width)
    counted = [ops.counted]
    for layer, index in {layer: index for index, layer in enumerate(shape.layers)}.items():
        counted += layer_footprint(_SPEC, _hyper(shape, layer), index, _weights(layer))
    return Footprint.sum(counted)


def head_footprint(shape: ModelShape) -> Footprint:
    """The output norm and the head of ``shape``."""
    if shape.counted is not None:
        return shape.counted.head
    ops = CountingOperations()
    normed = ops.norm("head_input", Counted("head_input", shape.width), _norm(shape.width), 0.0)
    ops.linear("logits", normed, _weight(shape.head))
    return ops.counted


def _hyper(shape: ModelShape, layer: LayerShape) -> Hyperparameters:
    # A window has rotary positions of its own base.
    rope = Rope("norm", shape.rope_dim, 2.0 if layer.window else 1.0) if shape.rope_dim else None
    facts = LayerFacts(
        layer.window,
        rope,
        ffn="dense" if layer.experts is None else "experts",
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        neurons=layer.up.rows,
        head_dim=shape.head_dim,
        value_dim=shape.head_dim,
    )
    return Hyperparameters(
        layers=len(shape.layers),
        width=shape.width,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        neurons=layer.up.rows,
        vocabulary=shape.vocabulary,
        trained_context=shape.trained_context,
        norm_eps=0.0,
        facts=(facts,) * len(shape.layers),
        parallel=shape.parallel,
        attention_scale=1.0,
        attention_softcap=0.0,
        qkv_limit=0.0,
        alibi=0.0,
        residual_scale=1.0,
        logit_scale=1.0,
        logit_softcap=0.0,
        embedding_scale=1.0,
        activation=shape.activation,
        activation_cut=0.0,
        routing=_routing(layer),
        recurrent=None,
        dense_neurons=0,
        value_dim=shape.head_dim,
        latent=None,
        chunked=False,
        post_norm_eps=0.0,
        further_layers=0,
        xielu=(),
        value_scale=1.0,
    )


def _routing(layer: LayerShape) -> Routing | None:
    experts = layer.experts
    return None if experts is None else Routing(experts.count, experts.used, False, experts.shared_neurons)


def _weights(layer: LayerShape) -> LayerWeights:
    query, key, value, output = map(_weight, layer.attention)
    norm = _norm(layer.width)
    attention = AttentionWeights(
        norm, query, key, value, output, None, None, None, None, None, None, post_norm=None
    )
    return LayerWeights(attention, norm, _ffn(layer), None, None, None)


def _ffn(layer: LayerShape) -> DenseFFN | ExpertsFFN:
    if layer.experts is None:
        return _dense(layer.ffn)
    count, (router, *gates) = layer.experts.count, map(_weight, layer.experts.router)
    *gate, up, down = (
        Stack("", RowType(m.row_type), count * m.rows, m.columns, (_NOTHING,)) for m in layer.ffn
    )
    shared = _dense(layer.experts.shared) if layer.experts.shared else None
    return ExpertsFFN(router, gate[0] if gate else None, up, down, shared, gates[0] if gates else None)


def _dense(matrices: tuple[MatrixShape, ...]) -> DenseFFN:
    *gate, up, down = map(_weight, matrices)
    return DenseFFN(gate[0] if gate else None, up, down)


def _weight(matrix: MatrixShape) -> Weight:
    return Weight("", RowType(matrix.row_type), matrix.rows, matrix.columns, _NOTHING)


def _norm(width: int) -> Norm:
    return Norm("rms", np.empty(width, np.float32))
