"""The weights of one layer, found by name and checked by shape."""

import numpy as np

from powerinfer_formats.split import SplitFile, SplitLayer
from powerinfer_tools.model.architectures import ArchitectureSpec
from powerinfer_tools.model.ffn_matrices import read_ffn
from powerinfer_tools.model.hyperparameter_types import Hyperparameters
from powerinfer_tools.model.latent import LatentWeights, read_latent
from powerinfer_tools.model.layer_weights import AttentionWeights, LayerWeights, RecurrentWeights
from powerinfer_tools.model.recurrent import read_recurrent
from powerinfer_tools.model.tensors import Norm, Tensors, Vector, Weight

#: Matrices and biases of queries, keys and values.
Projections = tuple[tuple[Weight, Weight, Weight], tuple[Vector | None, Vector | None, Vector | None]]


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
    ffn_bias = tensors.absent if spec.gated and not spec.gated_biases else tensors.optional
    up_bias = ffn_bias(f"{prefix}.ffn_up.bias", neurons)
    first_bias, factor_bias = up_bias, None
    if spec.gated:
        first_bias, factor_bias = ffn_bias(f"{prefix}.ffn_gate.bias", neurons), up_bias
    if facts.ffn != "none":
        rows = split.layers if split else ()
        feeds = rows[index] if rows else read_ffn(tensors, spec, hyper, index, split)
    return LayerWeights(
        attends=_attends(tensors, spec, hyper, index) if facts.mixer in ("attention", "both") else None,
        ffn_norm=_ffn_norm(tensors, spec, hyper, prefix, alone=feeds is None),
        feeds=feeds,
        ffn_bias=feeds.bias if isinstance(feeds, SplitLayer) else first_bias,
        ffn_factor_bias=factor_bias,
        ffn_down_bias=ffn_bias(f"{prefix}.{tensors.down_name}.bias", hyper.width),
        ffn_post_norm=_post_norm(tensors, spec, hyper, prefix, 1),
        ffn_inner_norm=tensors.optional_norm(
            spec, f"{prefix}.ffn_sub_norm", neurons, wanted=spec.inner_norms
        ),
        recurs=_recurrent(tensors, spec, hyper, prefix) if facts.mixer in ("recurrent", "both") else None,
    )


def _recurrent(
    tensors: Tensors, spec: ArchitectureSpec, hyper: Hyperparameters, prefix: str
) -> RecurrentWeights:
    assert hyper.recurrent is not None
    mixer = read_recurrent(tensors, spec.recurrent, hyper.recurrent, prefix, hyper.width)
    return RecurrentWeights(tensors.norm(spec, f"{prefix}.{spec.attention_norms[0]}", hyper.width), mixer)


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
    there = [name for name in names if tensors.has(f"{prefix}.{name}.weight")]
    return tensors.norm(spec, f"{prefix}.{(*there, names[0])[0]}", hyper.width)


def _attends(
    tensors: Tensors, spec: ArchitectureSpec, hyper: Hyperparameters, index: int
) -> AttentionWeights | LatentWeights:
    if hyper.latent is not None:
        return read_latent(tensors, hyper.latent, hyper.heads, hyper.width, f"blk.{index}")
    return _attention(tensors, spec, hyper, index)


def _attention(
    tensors: Tensors, spec: ArchitectureSpec, hyper: Hyperparameters, index: int
) -> AttentionWeights:
    prefix, facts, width = f"blk.{index}", hyper.facts[index], hyper.width
    attended = facts.heads * hyper.value_dim
    fused = spec.fused_qkv or tensors.has(f"{prefix}.attn_qkv.weight")
    projections = _fused_projections if fused else _projections
    (query, key, value), (query_bias, key_bias, value_bias) = projections(tensors, spec, hyper, index)
    gate, gate_bias = None, None
    if spec.attention_gate == "queries":
        (query, gate), (query_bias, gate_bias) = _gated(hyper, query, query_bias)
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
        inner_norm=tensors.optional_norm(spec, f"{prefix}.attn_sub_norm", attended, wanted=spec.inner_norms),
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
    (index, heads), dim = place, hyper.head_dim
    if spec.qk_norm == "own heads" and tensors.has(f"{name}.weight"):
        return Norm(spec.norm, tensors.table(f"{name}.weight", (heads, dim)).reshape(-1))
    if spec.qk_norm == "plain":
        there = hyper.facts[index].rope is not None and (
            hyper.routing is None or hyper.routing.experts != spec.unnormed_experts
        )
        return Norm(spec.norm, np.ones(dim, np.float32)) if there else None
    wanted = spec.qk_norm in ("heads", "row")
    if spec.qk_norm_optional and not tensors.has(f"{name}.weight"):
        return None
    return tensors.optional_norm(spec, name, heads * dim if spec.qk_norm == "row" else dim, wanted=wanted)


def _gated(
    hyper: Hyperparameters, both: Weight, bias: Vector | None
) -> tuple[tuple[Weight, Weight], tuple[Vector | None, Vector | None]]:
    """Rows of queries and of gates, which lie head by head: those of a head, then those of its gate."""
    places = np.arange(both.rows).reshape(hyper.heads, 2, hyper.head_dim)
    query, gate = (places[:, part].ravel() for part in (0, 1))
    biases = (None, None) if bias is None else (bias[query], bias[gate])
    return (both.rows_at(query), both.rows_at(gate)), biases


def _projections(tensors: Tensors, spec: ArchitectureSpec, hyper: Hyperparameters, index: int) -> Projections:
    prefix, facts, width = f"blk.{index}", hyper.facts[index], hyper.width
    queries = facts.heads * hyper.head_dim * (2 if spec.attention_gate == "queries" else 1)
    keys, values = facts.kv_heads * hyper.head_dim, facts.kv_heads * hyper.value_dim
    weights = (
        tensors.matrix(f"{prefix}.attn_q.weight", queries, width),
        tensors.matrix(f"{prefix}.attn_k.weight", keys, width),
        tensors.matrix(f"{prefix}.attn_v.weight", values, width),
    )
    biases = (
        tensors.optional(f"{prefix}.attn_q.bias", queries),
        tensors.optional(f"{prefix}.attn_k.bias", keys),
        tensors.optional(f"{prefix}.attn_v.bias", values),
    )
    return weights, biases


def _fused_projections(
    tensors: Tensors, spec: ArchitectureSpec, hyper: Hyperparameters, index: int
) -> Projections:
    """The same as views of one tensor."""
    prefix, facts = f"blk.{index}", hyper.facts[index]
    queries, keys = facts.heads * hyper.head_dim, facts.kv_heads * hyper.head_dim
    values = facts.kv_heads * hyper.value_dim
    rows = queries + keys + values
    fused = tensors.matrix(f"{prefix}.attn_qkv.weight", rows, hyper.width)
    bias = tensors.optional(f"{prefix}.attn_qkv.bias", rows)
    weights = (
        fused.part("queries", 0, queries),
        fused.part("keys", queries, keys),
        fused.part("values", queries + keys, values),
    )
    if bias is None:
        return weights, (None, None, None)
    return weights, (bias[:queries], bias[queries : queries + keys], bias[queries + keys :])
