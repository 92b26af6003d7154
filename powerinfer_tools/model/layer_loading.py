"""The weights of one layer, found by name and checked by shape."""

import numpy as np

from powerinfer_formats.split import SplitFile, SplitLayer
from powerinfer_tools.model.architectures import ArchitectureSpec
from powerinfer_tools.model.ffn_matrices import read_ffn
from powerinfer_tools.model.hyperparameter_types import Hyperparameters, LayerFacts
from powerinfer_tools.model.latent import LatentWeights, read_latent
from powerinfer_tools.model.layer_weights import AttentionWeights, LayerWeights, RecurrentWeights
from powerinfer_tools.model.recurrent import read_recurrent
from powerinfer_tools.model.streams import read_laurel, read_layer_input, read_layer_streams
from powerinfer_tools.model.tensors import Norm, Table, Tensors, Vector, Weight

#: Matrices and biases of queries, keys and values; a layer may have no keys, or no values, of its own.
Projections = tuple[
    tuple[Weight, Weight | None, Weight | None], tuple[Vector | None, Vector | None, Vector | None]
]


def load_layer(
    tensors: Tensors,
    spec: ArchitectureSpec,
    hyper: Hyperparameters,
    split: SplitFile | None,
    index: int,
) -> LayerWeights:
    """The weights of layer ``index``. Raises ModelError and FormatError."""
    prefix = f"blk.{index}"
    facts, feeds = hyper.facts[index], None
    neurons = facts.neurons if facts.ffn == "dense" else hyper.neurons
    biased = facts.ffn != "experts" and (spec.gated_biases or not spec.gated)
    ffn_bias = tensors.optional if biased else tensors.absent
    up_bias = ffn_bias(f"{prefix}.{spec.ffn_names[0]}.bias", neurons)
    first_bias, factor_bias = up_bias, None
    if spec.gated:
        first_bias, factor_bias = ffn_bias(f"{prefix}.ffn_gate.bias", neurons), up_bias
    if facts.ffn != "none":
        rows = split.layer(index) if split else None
        feeds = rows or read_ffn(tensors, spec, hyper, index, split)
    return LayerWeights(
        attends=_attends(tensors, spec, hyper, index) if facts.mixer in ("attention", "both") else None,
        ffn_norm=_ffn_norm(tensors, spec, hyper, prefix, alone=feeds is None),
        feeds=feeds,
        ffn_bias=feeds.bias if isinstance(feeds, SplitLayer) else first_bias,
        ffn_factor_bias=factor_bias,
        ffn_down_bias=ffn_bias(f"{prefix}.{_down_name(tensors, spec)}.bias", hyper.width),
        ffn_post_norm=_post_norm(tensors, spec, hyper, prefix, 1),
        ffn_inner_norm=tensors.optional_norm(
            spec, f"{prefix}.ffn_sub_norm", neurons, required=spec.inner_norms
        ),
        recurs=_recurrent(tensors, spec, hyper, index) if facts.mixer in ("recurrent", "both") else None,
        streams=None
        if hyper.streams is None
        else read_layer_streams(tensors, hyper.streams, hyper.width, prefix),
        input=read_layer_input(tensors, index, hyper.input_size, hyper.width, scaled=spec.streams)
        if hyper.input_size
        else None,
        output_scale=_output_scale(tensors, spec, prefix),
        embedding_share=float(tensors.vector(f"{prefix}.layer_output_scale.weight", 1)[0])
        if spec.embedding_shares
        else 0.0,
        ffn_shift=_shift(tensors, f"{prefix}.channel_mix_lerp_k.weight", hyper.width)
        if spec.ffn_shift
        else None,
    )


def _down_name(tensors: Tensors, spec: ArchitectureSpec) -> str:
    return tensors.down_name if spec.ffn_names[1] == "ffn_down" else spec.ffn_names[1]


def _shift(tensors: Tensors, name: str, width: int) -> Table:
    before = tensors.values(name, width)
    return np.stack([before, 1 - before])


def _output_scale(tensors: Tensors, spec: ArchitectureSpec, prefix: str) -> float:
    scale = tensors.optional(f"{prefix}.layer_output_scale.weight", 1) if spec.output_scales else None
    return 1.0 if scale is None else float(scale[0])


def _recurrent(
    tensors: Tensors, spec: ArchitectureSpec, hyper: Hyperparameters, index: int
) -> RecurrentWeights:
    assert hyper.recurrent is not None
    prefix = f"blk.{index}"
    mixer = read_recurrent(tensors, spec.recurrent, hyper.recurrent, prefix, hyper.width)
    norm = tensors.norm(spec, f"{prefix}.{spec.attention_norms[0]}", hyper.width)
    alone = hyper.facts[index].mixer == "recurrent"
    return RecurrentWeights(norm, mixer, _post_norm(tensors, spec, hyper, prefix, 0) if alone else None)


def _ffn_norm(
    tensors: Tensors, spec: ArchitectureSpec, hyper: Hyperparameters, prefix: str, *, alone: bool
) -> Norm | None:
    """``alone``: the layer has no FFN, and one norm."""
    name = spec.ffn_norm
    if not name:
        return None
    if alone or (spec.parallel == "without FFN norm" and hyper.parallel):
        name = spec.attention_norms[0]
    if tensors.has(f"{prefix}.{name}"):  # one converter leaves out the end of the name
        return Norm(spec.norm, tensors.vector(f"{prefix}.{name}", hyper.width))
    return tensors.norm(spec, f"{prefix}.{name}", hyper.width)


def _post_norm(
    tensors: Tensors, spec: ArchitectureSpec, hyper: Hyperparameters, prefix: str, block: int
) -> Norm | None:
    """The norm after attention (0) or the FFN (1); one converter leaves out the end of the name."""
    names = spec.post_norm_names[block]
    if not spec.post_norms:
        if names[0] != spec.ffn_norm:
            tensors.absent(f"{prefix}.{names[0]}.weight", hyper.width)
        return None
    for name in names:
        if tensors.has(f"{prefix}.{name}"):
            return Norm(spec.norm, tensors.vector(f"{prefix}.{name}", hyper.width))
    present = [name for name in names if tensors.has(f"{prefix}.{name}.weight")]
    return tensors.norm(spec, f"{prefix}.{(*present, names[0])[0]}", hyper.width)


def _attends(
    tensors: Tensors, spec: ArchitectureSpec, hyper: Hyperparameters, index: int
) -> AttentionWeights | LatentWeights:
    if hyper.latent is not None:
        gated = spec.attention_gate == "matrix"
        return read_latent(tensors, hyper.latent, hyper.heads, hyper.width, f"blk.{index}", gated=gated)
    return _attention(tensors, spec, hyper, index)


def _attention(
    tensors: Tensors, spec: ArchitectureSpec, hyper: Hyperparameters, index: int
) -> AttentionWeights:
    prefix, facts, width = f"blk.{index}", hyper.facts[index], hyper.width
    attended = facts.heads * facts.value_dim
    fused = spec.fused_qkv or tensors.has(f"{prefix}.attn_qkv.weight")
    projections = _fused_projections if fused else _projections
    (query, key, value), (query_bias, key_bias, value_bias) = projections(tensors, spec, hyper, index)
    gate, gate_bias = None, None
    if spec.attention_gate == "queries":
        (query, gate), (query_bias, gate_bias) = _gated(facts, query, query_bias)
    elif spec.attention_gate == "matrix":
        name = f"{prefix}.attn_gate.weight"
        rows = facts.heads if tensors.has(name) and tensors.shape(name)[0] == facts.heads else attended
        gate = tensors.matrix(name, rows, width)
    norms = [name for name in spec.attention_norms if tensors.has(f"{prefix}.{name}.weight")]
    return AttentionWeights(
        norm=tensors.norm(spec, f"{prefix}.{(*norms, 'attn_norm')[0]}", width)
        if spec.attention_norms
        else None,
        query=query,
        key=key,
        value=value,
        output=tensors.matrix(f"{prefix}.attn_output.weight", width, attended),
        query_bias=query_bias,
        key_bias=key_bias,
        value_bias=value_bias,
        output_bias=_output_bias(tensors, spec, f"{prefix}.attn_output.bias", width),
        query_norm=_head_norm(tensors, spec, hyper, f"{prefix}.attn_q_norm", (index, facts.heads)),
        key_norm=_head_norm(tensors, spec, hyper, f"{prefix}.attn_k_norm", (index, facts.kv_heads)),
        gate=gate,
        gate_bias=gate_bias,
        sinks=tensors.optional(f"{prefix}.attn_sinks.weight", facts.heads) if spec.sinks else None,
        post_norm=_post_norm(tensors, spec, hyper, prefix, 0),
        inner_norm=tensors.optional_norm(
            spec, f"{prefix}.attn_sub_norm", attended, required=spec.inner_norms
        ),
        value_norm=Norm("rms", np.ones(facts.value_dim, np.float32)) if spec.value_norm else None,
        laurel=read_laurel(tensors, width, prefix) if spec.streams else None,
    )


def _output_bias(tensors: Tensors, spec: ArchitectureSpec, name: str, width: int) -> Vector | None:
    if spec.output_bias:
        return tensors.optional(name, width)
    tensors.leave_out(name)
    return None


def _head_norm(
    tensors: Tensors, spec: ArchitectureSpec, hyper: Hyperparameters, name: str, place: tuple[int, int]
) -> Norm | None:
    """The norm of queries or keys of a layer that has so many heads of them."""
    index, heads = place
    facts = hyper.facts[index]
    dim = facts.head_dim
    if facts.cache is not None and name.endswith("attn_k_norm"):
        tensors.leave_out(f"{name}.weight")
        return None
    if spec.qk_norm == "own heads" and tensors.has(f"{name}.weight"):
        return Norm(spec.norm, tensors.values(f"{name}.weight", heads * dim))
    if spec.qk_norm == "gains":
        gains = tensors.values(f"{name}.weight", heads) if name.endswith("attn_q_norm") else np.ones(heads)
        return Norm(spec.norm, np.repeat(gains, dim).astype(np.float32))
    if spec.qk_norm == "plain":
        present = facts.rope is not None and (
            hyper.routing is None or hyper.routing.experts != spec.unnormed_experts
        )
        return Norm(spec.norm, np.ones(dim, np.float32)) if present else None
    required = spec.qk_norm in ("heads", "row")
    if spec.qk_norm_optional and not tensors.has(f"{name.replace('_k_norm', '_q_norm')}.weight"):
        return None
    return tensors.optional_norm(spec, name, heads * dim if spec.qk_norm == "row" else dim, required=required)


def _gated(
    facts: LayerFacts, both: Weight, bias: Vector | None
) -> tuple[tuple[Weight, Weight], tuple[Vector | None, Vector | None]]:
    """Rows of queries and of gates, which lie head by head: those of a head, then those of its gate."""
    places = np.arange(both.rows).reshape(facts.heads, 2, facts.head_dim)
    query, gate = (places[:, part].ravel() for part in (0, 1))
    biases = (None, None) if bias is None else (bias[query], bias[gate])
    return (both.rows_at(query), both.rows_at(gate)), biases


def _projections(tensors: Tensors, spec: ArchitectureSpec, hyper: Hyperparameters, index: int) -> Projections:
    prefix, facts, width = f"blk.{index}", hyper.facts[index], hyper.width
    queries = facts.heads * facts.head_dim * (2 if spec.attention_gate == "queries" else 1)
    sizes = {"k": facts.kv_heads * facts.head_dim, "v": facts.kv_heads * facts.value_dim}
    own_kinds = [kind for kind in sizes if _has_own(tensors, spec, facts, prefix, kind)]
    key, value = (
        tensors.matrix(f"{prefix}.attn_{kind}.weight", size, width) if kind in own_kinds else None
        for kind, size in sizes.items()
    )
    key_bias, value_bias = (
        tensors.optional(f"{prefix}.attn_{kind}.bias", size) if kind in own_kinds else None
        for kind, size in sizes.items()
    )
    query = tensors.matrix(f"{prefix}.attn_q.weight", queries, width)
    return (query, key, value), (tensors.optional(f"{prefix}.attn_q.bias", queries), key_bias, value_bias)


def _has_own(tensors: Tensors, spec: ArchitectureSpec, facts: LayerFacts, prefix: str, kind: str) -> bool:
    """Whether a layer has keys ("k") or values ("v") of its own; it may have matrices that are not used."""
    name = f"{prefix}.attn_{kind}.weight"
    if facts.cache is not None:
        tensors.leave_out(name)
        return False
    return kind == "k" or not spec.value_norm or tensors.has(name)


def _fused_projections(
    tensors: Tensors, spec: ArchitectureSpec, hyper: Hyperparameters, index: int
) -> Projections:
    """The same as views of one tensor."""
    prefix, facts = f"blk.{index}", hyper.facts[index]
    queries, keys = facts.heads * facts.head_dim, facts.kv_heads * facts.head_dim
    values = facts.kv_heads * facts.value_dim
    rows = queries + keys + values
    fused = tensors.matrix(f"{prefix}.attn_qkv.weight", rows, hyper.width)
    bias = tensors.optional(f"{prefix}.attn_qkv.bias", rows)
    weights = (
        fused.part("queries", 0, queries),
        None if facts.cache is not None else fused.part("keys", queries, keys),
        None if facts.cache is not None else fused.part("values", queries + keys, values),
    )
    if bias is None:
        return weights, (None, None, None)
    return weights, (bias[:queries], bias[queries : queries + keys], bias[queries + keys :])
