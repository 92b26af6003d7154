"""Hyper-parameters of a model, read from GGUF metadata and checked before anything is allocated from them."""

import math
from collections.abc import Sequence

from powerinfer_formats.model_source import ModelSource
from powerinfer_tools.model.architectures import ArchitectureSpec
from powerinfer_tools.model.ffn_keys import (
    read_activation,
    read_activation_cut,
    read_limits,
    read_neurons,
    read_routing,
    read_xielu,
)
from powerinfer_tools.model.hyperparameter_types import Hyperparameters, LayerFacts, Mixer
from powerinfer_tools.model.keys import Keys
from powerinfer_tools.model.mixer_keys import (
    HeadSizes,
    read_attention_scale,
    read_caches,
    read_dense_neurons,
    read_deviations,
    read_feeds,
    read_head_sizes,
    read_heads,
    read_latent_scale,
    read_latent_sizes,
    read_layers,
    read_mixers,
    read_recurrent_sizes,
    read_streams,
)
from powerinfer_tools.model.position_keys import (
    read_position_scale,
    read_ropes,
    read_rotated,
    read_trained_context,
    read_windows,
)


def read_hyperparameters(
    gguf: ModelSource, spec: ArchitectureSpec, vocabulary: int, positions: int
) -> Hyperparameters:
    """Read the hyper-parameters of ``spec``'s family.

    ``vocabulary`` is the number of rows of the embedding, ``positions`` the number of rows of the table of
    positions (0: there is none). Raises ModelError for values that make no model, and FormatError (from the
    reader) for missing keys or keys of the wrong type.
    """
    keys = Keys(gguf, spec.name)
    layers, width = read_layers(keys), keys.integer("embedding_length", high=1 << 20)
    routing = read_routing(keys, spec, width)
    mixers = read_mixers(keys, spec, layers)
    heads_of = read_heads(keys, spec, mixers)
    heads, kv_heads = (max(pair[part] for pair in heads_of) for part in (0, 1))
    sizes = read_head_sizes(keys, spec, width, heads)
    latent = read_latent_sizes(keys) if spec.latent else None
    if latent is not None:
        dims = (latent.rank, latent.rank) if latent.absorbed else (latent.plain, latent.value)
        kv_heads, dim = 1 if latent.absorbed else heads, dims[0] + latent.rotary
        sizes = HeadSizes(dim, dims[1], dim, dims[1])
    heads_of = [(count, kv_heads if latent else shared) for count, shared in heads_of]
    facts = _facts(keys, spec, mixers, sizes, heads_of, routed=routing is not None)
    hyper = Hyperparameters(
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=max(one.head_dim for one in facts),
        neurons=read_neurons(keys, spec, routing, layers),
        vocabulary=vocabulary,
        trained_context=read_trained_context(keys, spec, positions),
        norm_eps=_norm_eps(keys, spec),
        facts=facts,
        parallel=_parallel(keys, spec),
        attention_scale=read_attention_scale(keys, spec, layers, width, heads, sizes.key)
        if latent is None
        else read_latent_scale(keys, latent, rotary=spec.rope_style != "none"),
        attention_softcap=keys.real("attn_logit_softcapping", spec.default_softcap),
        qkv_limit=keys.real("attention.clamp_kqv", 0.0) if spec.clamped_qkv else 0.0,
        alibi=_alibi(keys, spec, layers),
        residual_scale=_residual_scale(keys, spec, layers),
        logit_scale=_logit_scale(keys, spec, width),
        logit_softcap=keys.real("final_logit_softcapping", 0.0),
        embedding_scale=_embedding_scale(keys, spec, width),
        activation=(activation := read_activation(gguf, spec)),
        activation_cut=read_activation_cut(gguf, activation),
        xielu=read_xielu(keys, layers) if activation == "xielu" else (),
        value_scale=keys.factor("attention.value_scale") if spec.value_scale else 1.0,
        routing=routing,
        recurrent=read_recurrent_sizes(keys, spec, width, layers),
        value_dim=max(one.value_dim for one in facts),
        latent=latent,
        dense_neurons=max(read_dense_neurons(keys, layers, 1)) if routing is not None else 0,
        chunked=spec.chunked,
        further_layers=keys.blocks - layers,
        post_norm_eps=spec.post_norm_eps or _norm_eps(keys, spec),
        input_size=keys.integer("embedding_length_per_layer_input", 256 if spec.streams else 0, low=0)
        if spec.layer_inputs
        else 0,
        streams=read_streams(keys, spec),
        clamp=spec.clamp,
    )
    keys.refuse_unread()
    return hyper


def _parallel(keys: Keys, spec: ArchitectureSpec) -> bool:
    if spec.parallel == "by key":
        return keys.flag("use_parallel_residual", default=True)
    if spec.parallel == "without FFN norm":
        return f"blk.0.{spec.ffn_norm}.weight" not in keys.gguf.tensors
    return spec.parallel == "always"


def _alibi(keys: Keys, spec: ArchitectureSpec, layers: int) -> float:
    if not spec.alibi or layers in spec.rotary_depths:
        return 0.0
    usual = not spec.rotary_depths or layers in spec.alibi_depths
    return keys.real("attention.max_alibi_bias", 8.0 if usual else 0.0, high=1e3)


def _residual_scale(keys: Keys, spec: ArchitectureSpec, layers: int) -> float:
    if not spec.residual_scale:
        return 1.0
    if spec.default_scales is not None and keys.raw("residual_scale") is None:
        return spec.default_scales[1] / math.sqrt(layers)
    return keys.factor("residual_scale")


def _logit_scale(keys: Keys, spec: ArchitectureSpec, width: int) -> float:
    if spec.logit_scale == "none":
        return 1.0
    if spec.default_scales is not None and keys.raw("logit_scale") is None:
        return spec.default_scales[2] / width
    scale = keys.factor("logit_scale")
    return scale if spec.logit_scale == "times" else 1.0 / scale


def _embedding_scale(keys: Keys, spec: ArchitectureSpec, width: int) -> float:
    if spec.default_scales is not None and keys.raw("embedding_scale") is None:
        return spec.default_scales[0]
    if spec.embedding_key:
        return keys.factor("embedding_scale")
    return math.sqrt(width) if spec.scaled_embeddings else 1.0


def _facts(
    keys: Keys,
    spec: ArchitectureSpec,
    mixers: Sequence[Mixer],
    sizes: HeadSizes,
    heads: Sequence[tuple[int, int]],
    *,
    routed: bool,
) -> tuple[LayerFacts, ...]:
    layers = len(mixers)
    feeds, neurons = read_feeds(keys, spec, layers), read_dense_neurons(keys, layers, 1)
    step = keys.integer("interleave_moe_layer_step", 0, low=0, high=4096) if routed else 0
    keys.ignore("interleave_moe_layer_step")
    first = keys.integer("leading_dense_block_count", 0, low=0, high=layers)
    windows = read_windows(keys, spec, layers)
    caches, deviations = read_caches(keys, spec, windows), read_deviations(keys, spec, layers)
    limits = read_limits(keys, spec, layers)
    wide, local = read_ropes(keys, spec, sizes.key, sizes.local_key, local=any(windows))
    windowed = spec.rope_in_windows_alone and any(windows)
    scale = read_position_scale(keys, spec, windowed=any(windows))
    facts = []
    for index, (window, rotated) in enumerate(zip(windows, read_rotated(keys, spec, layers), strict=True)):
        turned = rotated and (window or not windowed or (spec.rope_in_dense and index < first))
        rope = (local if window else wide) if turned else None
        # A layer has experts if it has a router: the keys for this have different meanings in different
        # families.
        experts = routed and f"blk.{index}.ffn_gate_inp.weight" in keys.gguf.tensors
        if step and index >= first and experts != ((index + 1) % step == 0):
            has = "has" if experts else "has no"
            keys.refuse(f"layer {index} {has} experts, with interleave_moe_layer_step {step}")
        facts.append(
            LayerFacts(
                window=window,
                rope=rope,
                mixer=mixers[index],
                ffn="experts" if experts else "dense" if feeds[index] else "none",
                heads=heads[index][0],
                kv_heads=heads[index][1],
                neurons=neurons[index] // spec.neurons_divisor,
                position_scale=None if spec.temperature == "without positions" and rope else scale,
                head_dim=sizes.local_key if window else sizes.key,
                value_dim=sizes.local_value if window else sizes.value,
                cache=caches[index],
                deviations=deviations[index],
                limits=limits[index],
            )
        )
    return tuple(facts)


def _norm_eps(keys: Keys, spec: ArchitectureSpec) -> float:
    if spec.norm == "rms":
        keys.ignore("attention.layer_norm_epsilon")  # of norms that the family does not have
        default = () if spec.default_norm_eps is None else (spec.default_norm_eps,)
        return keys.real("attention.layer_norm_rms_epsilon", *default, high=1.0)
    keys.ignore("attention.layer_norm_rms_epsilon")
    # PowerInfer's OPT files leave it out; this is torch's default, with which OPT was made.
    return keys.real("attention.layer_norm_epsilon", 1e-5, high=1.0)
