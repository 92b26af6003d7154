"""The blocks of a model: the forward pass, written once in the vocabulary of
:mod:`powerinfer_tools.model.operations`.

Everything comes from the architecture row, the hyper-parameters and the weights; nothing here depends on the
device that computes. A block returns its addend to the residual stream.
"""

from dataclasses import dataclass
from typing import Generic, TypeVar

from powerinfer_tools.model.architectures import ArchitectureSpec
from powerinfer_tools.model.ffn_matrices import DenseFFN, ExpertsFFN
from powerinfer_tools.model.hyperparameter_types import Hyperparameters
from powerinfer_tools.model.latent import LatentWeights, latent_attention
from powerinfer_tools.model.layer_weights import AttentionWeights, LayerWeights
from powerinfer_tools.model.loading import Model
from powerinfer_tools.model.operations import Activation, Attention, Operations
from powerinfer_tools.model.recurrent_blocks import recurrent
from powerinfer_tools.model.streams import (
    Along,
    add_to_others,
    begin,
    correct,
    end,
    input_block,
    laurel,
    layer_inputs,
    predict,
)
from powerinfer_tools.model.tensors import Norm, Table, Vector, Weight

V = TypeVar("V")
W = TypeVar("W")


@dataclass(frozen=True)
class FFN(Generic[W]):
    """The matrices of an FFN: the rows whose products the activation reads (``first``), the rows whose
    products multiply its result (None without a gate), and down (width, neurons), whose input may be
    normalised again. With ``deviations``, only gates so many standard deviations above the mean count."""

    first: W
    factor: W | None
    down: W
    bias: Vector | None = None
    down_bias: Vector | None = None
    factor_bias: Vector | None = None
    inner_norm: Norm | None = None
    eps: float = 0.0
    deviations: float | None = None


def embedding(ops: Operations[V, Weight], model: Model) -> V:
    """The residual stream before the first layer."""
    x = ops.embed("x", model.embedding, model.hyper.embedding_scale)
    if model.positions is not None:
        x = ops.embed_positions(x, model.positions, model.spec.position_offset or 0)
    return x if model.embedding_norm is None else ops.norm("x", x, model.embedding_norm, model.hyper.norm_eps)


def along(ops: Operations[V, Weight], model: Model, x: V) -> Along[V]:
    """The values that run beside the residual stream, which begins as ``x``."""
    made, eps = Along[V](), model.hyper.norm_eps
    if model.inputs is not None:
        made.inputs = layer_inputs(ops, model.inputs, x, eps)
    if model.spec.embedding_shares:
        made.embedding = ops.copy("embedding", x)
    if model.streams is not None:
        made.streams = begin(ops, model.streams, x)
    return made


def merged(ops: Operations[V, Weight], model: Model, x: V, beside: Along[V]) -> V:
    """The input of the head."""
    if model.streams is None or beside.streams is None:
        return x
    return end(ops, model.streams, beside.streams)


def finish(ops: Operations[V, Weight], hyper: Hyperparameters, w: LayerWeights, x: V, beside: Along[V]) -> V:
    """The residual stream at the end of a layer, after its FFN."""
    eps = hyper.norm_eps
    if w.streams is not None and w.input is not None:
        assert beside.inputs is not None
        assert beside.predicted is not None
        width, s = w.streams.router.columns, w.streams.sizes
        streams = correct(ops, w.streams, beside.predicted, x, eps)
        read = ops.part("active", streams, s.active * width, width)
        if w.input.scale is not None:
            read = ops.times(read, w.input.scale)
        added = input_block(ops, w.input, beside.inputs, read, eps)
        beside.streams = add_to_others(ops, w.streams, streams, added)
        return x
    if w.input is not None:
        assert beside.inputs is not None
        x = ops.join(x, input_block(ops, w.input, beside.inputs, x, eps))
    if w.embedding_share:
        assert beside.embedding is not None
        x = ops.join(x, beside.embedding, w.embedding_share)
    return scaled(ops, x, w.output_scale)


def attention_of(hyper: Hyperparameters, layer: int, sinks: Vector | None = None) -> Attention:
    """How ``layer`` attends."""
    facts = hyper.facts[layer]
    return Attention(
        layer=layer if facts.cache is None else facts.cache,
        heads=facts.heads,
        kv_heads=facts.kv_heads,
        head_dim=facts.head_dim,
        scale=hyper.attention_scale,
        window=0 if hyper.chunked else facts.window,
        chunk=facts.window if hyper.chunked else 0,
        softcap=hyper.attention_softcap,
        alibi=hyper.alibi,
        sinks=sinks,
        value_dim=facts.value_dim,
    )


def attention(
    ops: Operations[V, Weight],
    spec: ArchitectureSpec,
    hyper: Hyperparameters,
    layer: int,
    w: AttentionWeights,
    x: V,
) -> V:
    """The attention of ``layer``."""
    how, rope, eps = attention_of(hyper, layer, w.sinks), hyper.facts[layer].rope, hyper.norm_eps
    normed = x if w.norm is None else ops.norm("attention_input", x, w.norm, eps)
    query = ops.linear("query", normed, w.query, w.query_bias)
    made = keys_and_values(ops, w, normed)
    key, value = made
    if hyper.qkv_limit and key is not None and value is not None:
        query, key, value = (ops.clamp(part, hyper.qkv_limit) for part in (query, key, value))
    gate = None if w.gate is None else ops.linear("attention_gate", normed, w.gate, w.gate_bias)
    if value is not None and w.value_norm is not None:
        value = ops.norm_heads(value, how.kv_heads, w.value_norm, eps)
    if not spec.qk_norm_late:
        query, key = qk_normed(ops, spec, how, w, query, key, eps)
    if rope is not None:
        query = ops.rotate(query, how.heads, how.head_dim, rope)
        key = None if key is None else ops.rotate(key, how.kv_heads, how.head_dim, rope)
    if spec.qk_norm_late:
        query, key = qk_normed(ops, spec, how, w, query, key, eps)
    if (growth := hyper.facts[layer].position_scale) is not None:
        query = ops.scale_by_position(query, growth)
    attended = ops.attend(query, key, value, how)
    attended = scaled(ops, attended, hyper.value_scale)
    if w.inner_norm is not None:
        attended = ops.norm("attended", attended, w.inner_norm, eps)
    if gate is not None:
        attended = gated(ops, Activation(spec.gate_activation), w, gate, attended)
    out = ops.linear("block_out", attended, w.output, w.output_bias)
    out = post_normed(ops, out, w.post_norm, hyper.post_norm_eps)
    return out if w.laurel is None else laurel(ops, w.laurel, normed, out, eps)


def keys_and_values(ops: Operations[V, Weight], w: AttentionWeights, normed: V) -> tuple[V | None, V | None]:
    """Keys and values; None in a layer that reads the keys and values of an earlier layer. Without a matrix
    for values, the keys are the values."""
    if w.key is None:
        return None, None
    key = ops.linear("key", normed, w.key, w.key_bias)
    if w.value is None:
        return key, ops.copy("value", key)
    return key, ops.linear("value", normed, w.value, w.value_bias)


def gated(ops: Operations[V, Weight], how: Activation, w: AttentionWeights, gate: V, attended: V) -> V:
    """The result of attention times act(gate), which has a value for each value of the result, or for each
    head."""
    assert w.gate is not None
    if w.gate.rows == w.output.columns:
        return ops.activate(gate, attended, how)
    return ops.times(attended, ops.activate(gate, None, how), w.output.columns // w.gate.rows)


def mix(
    ops: Operations[V, Weight],
    spec: ArchitectureSpec,
    hyper: Hyperparameters,
    layer: int,
    w: LayerWeights,
    x: V,
    along: Along[V],
) -> V:
    """The residual stream after the token mixer of ``layer``: attention, a recurrent block, both in parallel,
    or nothing."""
    eps, out, beside = hyper.norm_eps, None, None
    if w.streams is not None:
        assert along.streams is not None
        along.predicted = predict(ops, w.streams, along.streams, eps)
        x = ops.part("x", along.predicted, w.streams.sizes.active * hyper.width, hyper.width)
    if isinstance(w.attends, LatentWeights):
        out = latent_attention(ops, attention_of(hyper, layer), hyper.facts[layer], eps, w.attends, x)
    elif w.attends is not None:
        out = attention(ops, spec, hyper, layer, w.attends, x)
    if w.recurs is not None:
        normed = ops.norm("attention_input", x, w.recurs.norm, eps)
        beside = recurrent(ops, w.recurs.mixer, normed, eps, along)
        beside = post_normed(ops, beside, w.recurs.post_norm, hyper.post_norm_eps)
    for part in (out, beside):
        if part is not None:
            x = ops.join(x, part, hyper.residual_scale)
    return scaled(ops, x, spec.mixed_scale)


def qk_normed(
    ops: Operations[V, Weight],
    spec: ArchitectureSpec,
    how: Attention,
    w: AttentionWeights,
    query: V,
    key: V | None,
    eps: float,
) -> tuple[V, V | None]:
    """Queries and keys, normalised where the family does that."""
    whole = spec.qk_norm == "row"
    heads, kv_heads = (1, 1) if whole else (how.heads, how.kv_heads)
    if w.query_norm is not None:
        query = ops.norm_heads(query, heads, w.query_norm, eps)
    if w.key_norm is not None and key is not None:
        key = ops.norm_heads(key, kv_heads, w.key_norm, eps)
    return query, key


def ffn_input(ops: Operations[V, W], norm: Norm | None, eps: float, x: V, shift: Table | None = None) -> V:
    """The input of an FFN's matrices; with ``shift``, it is mixed with the input of the token before."""
    if shift is not None and norm is not None:
        normed = ops.norm("shifted", x, norm, eps)
        return ops.convolve("normed", normed, shift, None, 0, silu=False)
    return ops.copy("normed", x) if norm is None else ops.norm("normed", x, norm, eps)


def ffn(ops: Operations[V, W], how: Activation, w: FFN[W], normed: V, out: str = "block_out") -> V:
    """A dense FFN, or an expert: down · (act(first · x + bias) · (factor · x)) + down_bias."""
    gate = ops.linear("gate", normed, w.first, w.bias)
    up = None if w.factor is None else ops.linear("up", normed, w.factor, w.factor_bias)
    if w.deviations is not None:
        gate = ops.keep_top(gate, w.deviations)
    hidden = ops.activate(gate, up, how)
    if w.inner_norm is not None:
        hidden = ops.norm("gate", hidden, w.inner_norm, w.eps)
    return ops.linear(out, hidden, w.down, w.down_bias)


def experts(
    ops: Operations[V, Weight],
    spec: ArchitectureSpec,
    hyper: Hyperparameters,
    layer: int,
    w: ExpertsFFN,
    normed: V,
    inputs: tuple[V, V],
) -> V:
    """The router and the experts that it chooses, which read ``inputs``, and the one that every token takes,
    which reads ``normed``, times a sigmoid where it has a gate."""
    routing, how, eps = hyper.routing, activation_of(hyper, layer, routed=True), hyper.norm_eps
    assert routing is not None
    routed_by, read = inputs

    def expert(index: int, x: V) -> V:
        biases = [None if one is None else one[index] for one in w.biases]
        first, factor = (biases[1], None) if w.gate is None else (biases[0], biases[1])
        part = w.expert(index)
        weights = FFN(part.first, part.factor, part.down, first, biases[2], factor)
        return ffn(ops, how, weights, x, "expert_out")

    scores = ops.linear("scores", routed_by, w.router, w.router_bias)
    out = ops.experts(scores, read, routing, expert, w.choice_bias)
    if w.norms is not None:
        out = ops.norm("experts_out", out, w.norms.experts_out, eps)
    if w.shared is None:
        return out
    shared = ffn(ops, activation_of(hyper, layer), dense_of(w.shared), normed, "shared_out")
    if w.norms is not None:
        shared = ops.norm("shared_out", shared, w.norms.dense_out, eps)
    if w.shared_gate is not None:
        shared = ops.weigh(shared, ops.linear("shared_score", normed, w.shared_gate))
    return scaled(ops, ops.join(out, shared), spec.shared_factor)


def expert_inputs(
    ops: Operations[V, Weight],
    spec: ArchitectureSpec,
    eps: float,
    w: ExpertsFFN,
    normed: V,
    x: V,
    before: V | None,
) -> tuple[V, V]:
    """What the router reads, and what the experts do: ``normed``, or the residual stream ``x`` or the layer's
    input ``before``, normalised for them."""
    if w.norms is not None:
        router = ops.norm("router_input", x, w.norms.router, eps)
        return router, ops.norm("expert_input", x, w.norms.experts, eps)
    read = normed
    if w.beside_norm is not None:
        assert before is not None
        read = ops.norm("expert_input", before, w.beside_norm, eps)
    return (read if before is None or not spec.early_router else before), read


def scaled(ops: Operations[V, W], x: V, factor: float) -> V:
    """factor · x."""
    return x if factor == 1.0 else ops.scale(x, factor)


def dense_of(w: DenseFFN, bias: Vector | None = None, down_bias: Vector | None = None) -> FFN[Weight]:
    """The matrices of a source model's FFN, or of an expert."""
    return FFN(w.first, w.factor, w.down, bias, down_bias)


def activation_of(hyper: Hyperparameters, layer: int = 0, *, routed: bool = False) -> Activation:
    """The activation of the FFN of ``layer``, or of experts that its router chooses."""
    if limit := hyper.facts[layer].limits[0 if routed else 1]:
        return Activation(hyper.clamp, limit)
    if hyper.xielu:
        return Activation(hyper.activation, constants=hyper.xielu[layer])
    return Activation(hyper.activation, hyper.activation_cut)


def post_normed(ops: Operations[V, W], out: V, norm: Norm | None, eps: float) -> V:
    """A block's output, normalised where the family does that."""
    return out if norm is None else ops.norm("block_out", out, norm, eps)


def logits(ops: Operations[V, W], model: Model, matrix: W, x: V) -> V:
    """Logits (T, vocabulary), before they are scaled and soft-capped; ``matrix`` is the head's."""
    normed = ops.norm("head_input", x, model.output_norm, model.hyper.norm_eps)
    return ops.linear("logits", normed, matrix, model.head_bias)


def head(ops: Operations[V, W], model: Model, matrix: W, x: V) -> V:
    """Logits (T, vocabulary)."""
    hyper = model.hyper
    out = scaled(ops, logits(ops, model, matrix, x), hyper.logit_scale)
    return ops.softcap(out, hyper.logit_softcap) if hyper.logit_softcap else out
