"""Small random files of families that mix tokens without attention, or route in ways of their own: no tokens,
F32 rows, and sizes that divide by nothing."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter

WIDTH, HEADS, KV_HEADS, DIM, NEURONS, VOCABULARY = 36, 3, 1, 20, 44, 50
EXPERTS, USED, EXPERT_NEURONS, SHARED = 5, 2, 28, 24
INNER, STATE, RECURRENT_HEADS, GROUPS, LENGTH = 48, 10, 4, 2, 4
RANK, QUERY_RANK, PLAIN, ROTARY, VALUE = 18, 22, 14, 6, 10
INPUT, STREAMS, LOCAL_DIM = 10, 3, 14
_EXPERT_NORMS = ("pre_ffw_norm_2", "post_ffw_norm_1", "post_ffw_norm_2")
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class RandomFamily:
    """What a file of it holds: metadata below the family's prefix, and tensors, a layer after the other."""

    name: str
    metadata: Mapping[str, Any]
    layers: tuple[Shapes, ...]
    output_norm: str = "output_norm"
    more: Shapes = field(default_factory=dict)


def _attention(
    *,
    gated: bool = False,
    norms: bool = False,
    biases: bool = False,
    sinks: bool = False,
    heads: int = HEADS,
    kv_heads: int = KV_HEADS,
) -> Shapes:
    queries, keys = heads * DIM * (2 if gated else 1), kv_heads * DIM
    shapes: Shapes = {
        "attn_norm.weight": (WIDTH,),
        "attn_q.weight": (queries, WIDTH),
        "attn_k.weight": (keys, WIDTH),
        "attn_v.weight": (keys, WIDTH),
        "attn_output.weight": (WIDTH, heads * DIM),
    }
    if norms:
        shapes |= {"attn_q_norm.weight": (DIM,), "attn_k_norm.weight": (DIM,)}
    if biases:
        shapes |= {"attn_q.bias": (queries,), "attn_output.bias": (WIDTH,)}
    if sinks:
        shapes |= {"attn_sinks.weight": (HEADS,)}
    return shapes


def _ffn(
    norm: str = "ffn_norm", *, gated: bool = True, biases: bool = False, neurons: int = NEURONS
) -> Shapes:
    shapes: Shapes = {
        f"{norm}.weight": (WIDTH,),
        "ffn_up.weight": (neurons, WIDTH),
        "ffn_down.weight": (WIDTH, neurons),
    }
    if gated:
        shapes["ffn_gate.weight"] = (neurons, WIDTH)
    if biases:
        kinds = ("gate", "up", "down") if gated else ("up", "down")
        shapes |= {f"ffn_{kind}.bias": (WIDTH if kind == "down" else neurons,) for kind in kinds}
    return shapes


def _experts(
    norm: str = "ffn_norm",
    *,
    gated: bool = True,
    biases: bool = False,
    chosen: bool = False,
    together: bool = False,
) -> Shapes:
    rows = {"gate": EXPERT_NEURONS, "up": EXPERT_NEURONS, "down": WIDTH}
    shapes: Shapes = {
        f"{norm}.weight": (WIDTH,),
        "ffn_gate_inp.weight": (EXPERTS, WIDTH),
        "ffn_down_exps.weight": (EXPERTS, WIDTH, EXPERT_NEURONS),
    }
    if together:
        shapes["ffn_gate_up_exps.weight"] = (EXPERTS, 2 * EXPERT_NEURONS, WIDTH)
    else:
        kinds = ("gate", "up") if gated else ("up",)
        shapes |= {f"ffn_{kind}_exps.weight": (EXPERTS, EXPERT_NEURONS, WIDTH) for kind in kinds}
    if biases:
        shapes |= {f"ffn_{kind}_exps.bias": (EXPERTS, size) for kind, size in rows.items()}
        shapes["ffn_gate_inp.bias"] = (EXPERTS,)
    if chosen:
        shapes["exp_probs_b.bias"] = (EXPERTS,)
    return shapes


def _shared(*, gated: bool) -> Shapes:
    shapes: Shapes = {f"ffn_{kind}_shexp.weight": (SHARED, WIDTH) for kind in ("gate", "up")}
    shapes["ffn_down_shexp.weight"] = (WIDTH, SHARED)
    return shapes | ({"ffn_gate_inp_shexp.weight": (WIDTH,)} if gated else {})


def _llama4_shared() -> Shapes:
    """As large as an expert."""
    rows = {"gate": (EXPERT_NEURONS, WIDTH), "up": (EXPERT_NEURONS, WIDTH), "down": (WIDTH, EXPERT_NEURONS)}
    return {f"ffn_{kind}_shexp.weight": shape for kind, shape in rows.items()}


def _normed_experts(*, together: bool) -> Shapes:
    """What layers of Gemma 4 with experts have beside their FFN: the rows of gate and up of all experts
    ``together`` or apart, and a scale of each expert's down matrix."""
    shapes = _experts(together=together)
    del shapes["ffn_norm.weight"]
    names = ("ffn_gate_inp.scale", *(f"{name}.weight" for name in _EXPERT_NORMS))
    return shapes | dict.fromkeys(names, (WIDTH,)) | {"ffn_down_exps.scale": (EXPERTS,)}


def _fused(shapes: Shapes) -> Shapes:
    """Queries, keys and values as one tensor."""
    names = [f"attn_{kind}.weight" for kind in "qkv"]
    rows = sum(shapes[name][0] for name in names)
    others = {name: shape for name, shape in shapes.items() if name not in names}
    return others | {"attn_qkv.weight": (rows, WIDTH)}


def _ungated(shapes: Shapes) -> Shapes:
    return {name: shape for name, shape in shapes.items() if "_gate_" not in name}


def _convolution() -> Shapes:
    return {
        "attn_norm.weight": (WIDTH,),
        "shortconv.in_proj.weight": (3 * WIDTH, WIDTH),
        "shortconv.conv.weight": (WIDTH, 3),
        "shortconv.out_proj.weight": (WIDTH, WIDTH),
    }


def _state_space(*, norm: bool = True) -> Shapes:
    channels = INNER + 2 * GROUPS * STATE
    shapes: Shapes = {
        "attn_norm.weight": (WIDTH,),
        "ssm_in.weight": (INNER + channels + RECURRENT_HEADS, WIDTH),
        "ssm_conv1d.weight": (channels, LENGTH),
        "ssm_conv1d.bias": (channels,),
        "ssm_dt.bias": (RECURRENT_HEADS,),
        "ssm_a": (RECURRENT_HEADS, 1),
        "ssm_d": (RECURRENT_HEADS, 1),
        "ssm_out.weight": (WIDTH, INNER),
    }
    return shapes | ({"ssm_norm.weight": (GROUPS, INNER // GROUPS)} if norm else {})


def _selective_scan(*, norms: bool) -> Shapes:
    shapes: Shapes = {
        "attn_norm.weight": (WIDTH,),
        "ssm_in.weight": (2 * INNER, WIDTH),
        "ssm_conv1d.weight": (INNER, LENGTH),
        "ssm_conv1d.bias": (INNER,),
        "ssm_x.weight": (RECURRENT_HEADS + 2 * STATE, INNER),
        "ssm_dt.weight": (INNER, RECURRENT_HEADS),
        "ssm_dt.bias": (INNER,),
        "ssm_a": (INNER, STATE),
        "ssm_d": (INNER,),
        "ssm_out.weight": (WIDTH, INNER),
    }
    if norms:
        shapes |= {"ssm_dt_norm.weight": (RECURRENT_HEADS,)}
        shapes |= {f"ssm_{kind}_norm.weight": (STATE,) for kind in "bc"}
    return shapes


def _delta_net(*, interleaved: bool, older: bool = False) -> Shapes:
    channels = INNER + 2 * GROUPS * STATE
    shapes: Shapes = {
        "attn_norm.weight": (WIDTH,),
        "ssm_conv1d.weight": (channels, LENGTH),
        "ssm_dt.bias": (RECURRENT_HEADS,),
        "ssm_a": (RECURRENT_HEADS,),
        "ssm_norm.weight": (INNER // RECURRENT_HEADS,),
        "ssm_out.weight": (WIDTH, INNER),
    }
    if older:
        shapes["ssm_in.weight"] = (channels + INNER, WIDTH)
    else:
        shapes |= {"attn_qkv.weight": (channels, WIDTH), "attn_gate.weight": (INNER, WIDTH)}
    if interleaved:
        return shapes | {"ssm_ba.weight": (2 * RECURRENT_HEADS, WIDTH)}
    return shapes | {f"ssm_{kind}.weight": (RECURRENT_HEADS, WIDTH) for kind in ("alpha", "beta")}


def _channel_delta_net(*, low: bool = True) -> Shapes:
    """Decays and the gate are products of ``low`` rank, or of full rank."""
    inner = HEADS * STATE
    shapes: Shapes = {
        "attn_norm.weight": (WIDTH,),
        "ssm_dt.bias": (inner,),
        "ssm_a": (HEADS, 1),
        "ssm_beta.weight": (HEADS, WIDTH),
        "ssm_norm.weight": (STATE,),
        "attn_output.weight": (WIDTH, inner),
    }
    for kind in "qkv":
        shapes |= {
            f"attn_{kind}.weight": (inner, WIDTH),
            f"ssm_conv1d_{kind}.weight": (inner, 1, LENGTH),
        }
    if not low:
        return shapes | {f"ssm_{kind}_a.weight": (inner, WIDTH) for kind in "fg"}
    for kind in "fg":
        shapes |= {f"ssm_{kind}_a.weight": (STATE, WIDTH), f"ssm_{kind}_b.weight": (inner, STATE)}
    return shapes


def _latent(*, low: bool) -> Shapes:
    queries = {"attn_q_a.weight": (QUERY_RANK, WIDTH), "attn_q_a_norm.weight": (QUERY_RANK,)} if low else {}
    name, columns = ("attn_q_b", QUERY_RANK) if low else ("attn_q", WIDTH)
    return {
        "attn_norm.weight": (WIDTH,),
        **queries,
        f"{name}.weight": (HEADS * (PLAIN + ROTARY), columns),
        "attn_kv_a_mqa.weight": (RANK + ROTARY, WIDTH),
        "attn_kv_a_norm.weight": (RANK,),
        "attn_k_b.weight": (HEADS, RANK, PLAIN),
        "attn_v_b.weight": (HEADS, VALUE, RANK),
        "attn_output.weight": (WIDTH, HEADS * VALUE),
    }


def _expanded(*, low: bool) -> Shapes:
    """One matrix for keys and values of all heads."""
    shapes = _latent(low=low)
    del shapes["attn_k_b.weight"], shapes["attn_v_b.weight"]
    return shapes | {"attn_kv_b.weight": (HEADS * (PLAIN + VALUE), RANK)}


def _gemma(
    *,
    dim: int = DIM,
    kv_heads: int = KV_HEADS,
    keys: bool = True,
    values: bool = True,
    neurons: int = NEURONS,
) -> Shapes:
    """A layer of Gemma 3n or 4 whose heads are ``dim`` wide, with keys and values of its own or without."""
    shapes = _attention(kv_heads=kv_heads) | _ffn(neurons=neurons)
    shapes |= {
        "attn_q.weight": (HEADS * dim, WIDTH),
        "attn_k.weight": (kv_heads * dim, WIDTH),
        "attn_v.weight": (kv_heads * dim, WIDTH),
        "attn_output.weight": (WIDTH, HEADS * dim),
        "attn_q_norm.weight": (dim,),
        "attn_k_norm.weight": (dim,),
        "post_attention_norm.weight": (WIDTH,),
        "post_ffw_norm.weight": (WIDTH,),
    }
    left_out = {"attn_k.weight", "attn_v.weight", "attn_k_norm.weight"} if not keys else set()
    left_out |= {"attn_v.weight"} if not values else set()
    return {name: shape for name, shape in shapes.items() if name not in left_out}


def _own_input() -> Shapes:
    return {"inp_gate.weight": (INPUT, WIDTH), "proj.weight": (WIDTH, INPUT), "post_norm.weight": (WIDTH,)}


def _altup() -> Shapes:
    """Streams, and what stands beside attention."""
    return _own_input() | {
        "altup_correct_coef.weight": (STREAMS, STREAMS),
        "altup_correct_scale.weight": (WIDTH,),
        "altup_predict_coef.weight": (STREAMS * STREAMS, STREAMS),
        "altup_router.weight": (STREAMS, WIDTH),
        "altup_router_norm.weight": (WIDTH,),
        "laurel_l.weight": (7, WIDTH),
        "laurel_r.weight": (WIDTH, 7),
        "laurel_post_norm.weight": (WIDTH,),
    }


def _inputs(layers: int) -> Shapes:
    return {
        "per_layer_token_embd.weight": (VOCABULARY, layers * INPUT),
        "per_layer_model_proj.weight": (layers * INPUT, WIDTH),
        "per_layer_proj_norm.weight": (INPUT,),
    }


def _time_mixing(rank: int = 7, *, gated: bool = True) -> Shapes:
    name, parts = "time_mix", 6 if gated else 5
    shapes: Shapes = {"attn_norm.weight": (WIDTH,), f"{name}_lerp_fused.weight": (parts, 1, 1, WIDTH)}
    for kind in "wav" + ("g" if gated else ""):
        shapes |= {f"{name}_{kind}1.weight": (rank, WIDTH), f"{name}_{kind}2.weight": (WIDTH, rank)}
    shapes |= {f"{name}_{kind}.weight": (WIDTH,) for kind in ("w0", "a0", "v0", "k_k", "k_a", "r_k")}
    kinds = ("key", "value", "receptance", "output")
    shapes |= {f"{name}_{kind}.weight": (WIDTH, WIDTH) for kind in kinds}
    return shapes | ({f"{name}_ln.weight": (WIDTH,), f"{name}_ln.bias": (WIDTH,)} if gated else {})


def _head_scan(rank: int = 7) -> Shapes:
    return {
        "attn_norm.weight": (WIDTH,),
        "ssm_in.weight": (2 * INNER, WIDTH),
        "ssm_conv1d.weight": (INNER, LENGTH),
        "ssm_x.weight": (2 * STATE + rank, INNER),
        "ssm_dt.weight": (RECURRENT_HEADS, rank),
        "ssm_dt.bias": (RECURRENT_HEADS,),
        "ssm_a": (RECURRENT_HEADS,),
        "ssm_d": (RECURRENT_HEADS,),
        "ssm_b_norm": (STATE,),
        "ssm_c_norm": (STATE,),
        "ssm_dt_norm": (rank,),
        "ssm_out.weight": (WIDTH, INNER),
    }


def _plamo2() -> Shapes:
    """What both kinds of its layers have."""
    return {
        "post_attention_norm": (WIDTH,),
        "ffn_norm.weight": (WIDTH,),
        "post_ffw_norm": (WIDTH,),
        "ffn_up.weight": (2 * NEURONS, WIDTH),
        "ffn_down.weight": (WIDTH, NEURONS),
    }


def _talkie() -> Shapes:
    shapes = _attention() | _ffn() | {"attn_q_norm.weight": (HEADS, 1), "layer_output_scale.weight": (1,)}
    return {
        name: shape for name, shape in shapes.items() if name not in ("attn_norm.weight", "ffn_norm.weight")
    }


def _channel_mixing() -> Shapes:
    return {
        "attn_norm.bias": (WIDTH,),
        "attn_norm_2.weight": (WIDTH,),
        "attn_norm_2.bias": (WIDTH,),
        "channel_mix_lerp_k.weight": (1, 1, WIDTH),
        "channel_mix_key.weight": (NEURONS, WIDTH),
        "channel_mix_value.weight": (WIDTH, NEURONS),
    }


def _narrow(shapes: Shapes, *, kv_heads: int = KV_HEADS) -> Shapes:
    """Value heads of their own width."""
    rows = {"attn_v.weight": (kv_heads * VALUE, WIDTH), "attn_output.weight": (WIDTH, HEADS * VALUE)}
    return shapes | rows


_HEADS: dict[str, Any] = {
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS,
    "attention.key_length": DIM,
    "attention.value_length": DIM,
}
_EXPERTS: dict[str, Any] = {
    "expert_count": EXPERTS,
    "expert_used_count": USED,
    "expert_feed_forward_length": EXPERT_NEURONS,
}
_SSM: dict[str, Any] = {
    "ssm.inner_size": INNER,
    "ssm.state_size": STATE,
    "ssm.time_step_rank": RECURRENT_HEADS,
    "ssm.conv_kernel": LENGTH,
}
_GROUPED = _SSM | {"ssm.group_count": GROUPS}
_LATENT: dict[str, Any] = {
    "attention.head_count": HEADS,
    "attention.head_count_kv": 1,
    "attention.key_length": RANK + ROTARY,
    "attention.value_length": RANK,
    "attention.kv_lora_rank": RANK,
    "attention.key_length_mla": PLAIN + ROTARY,
    "attention.value_length_mla": VALUE,
    "rope.dimension_count": ROTARY,
    "leading_dense_block_count": 1,
    "expert_shared_count": 2,
    "expert_weights_norm": True,
    "expert_weights_scale": 2.5,
}
_EXPANDED: dict[str, Any] = {
    "attention.head_count": HEADS,
    "attention.head_count_kv": HEADS,
    "attention.key_length": PLAIN + ROTARY,
    "attention.value_length": VALUE,
    "attention.kv_lora_rank": RANK,
    "rope.dimension_count": ROTARY,
}
_MIXED = _HEADS | {"attention.head_count_kv": [KV_HEADS, 0]}
_BLOCKS = {"attention.head_count_kv": [KV_HEADS, 0, 0], "feed_forward_length": [0, 0, NEURONS]}
_NEXT = _HEADS | _GROUPED | {"attention.recurrent_layers": [1, 0]}
_POST = "post_attention_norm"
_GEMMA = _HEADS | {
    "attention.sliding_window": 5,
    "attention.sliding_window_pattern": [True, False, True, False],
    "rope.freq_base": 1e6,
    "final_logit_softcapping": 30.0,
}
_GEMMA4: dict[str, Any] = {
    "attention.key_length_swa": LOCAL_DIM,
    "attention.value_length_swa": LOCAL_DIM,
    "rope.dimension_count": DIM,
    "rope.dimension_count_swa": LOCAL_DIM,
}

FAMILIES = {
    "mamba": RandomFamily("mamba", _SSM, (_selective_scan(norms=False),) * 2),
    "mamba2": RandomFamily("mamba2", _GROUPED, (_state_space(), _state_space(norm=False))),
    "jamba": RandomFamily(
        "jamba", _MIXED | _SSM, (_attention() | _ffn(), _selective_scan(norms=True) | _ffn())
    ),
    "lfm2": RandomFamily(
        "lfm2",
        _MIXED | {"shortconv.l_cache": 3},
        (_attention(norms=True) | _ffn(), _convolution() | _ffn()),
        output_norm="token_embd_norm",
    ),
    "lfm2moe": RandomFamily(
        "lfm2moe",
        _MIXED | _EXPERTS | {"shortconv.l_cache": 3, "leading_dense_block_count": 1, "expert_gating_func": 2},
        (_attention(norms=True) | _ffn(), _convolution() | _experts(chosen=True)),
        output_norm="token_embd_norm",
    ),
    "nemotron_h": RandomFamily(
        "nemotron_h",
        _HEADS | _GROUPED | _BLOCKS,
        (_attention(), _state_space(), _ffn("attn_norm", gated=False, biases=True)),
    ),
    "nemotron_h_moe": RandomFamily(
        "nemotron_h_moe",
        _HEADS
        | _GROUPED
        | _BLOCKS
        | _EXPERTS
        | {"expert_shared_feed_forward_length": SHARED, "expert_weights_scale": 2.5},
        (
            _attention(),
            _state_space(),
            _experts("attn_norm", gated=False, chosen=True) | _ungated(_shared(gated=False)),
        ),
    ),
    "granitehybrid": RandomFamily(
        "granitehybrid",
        _MIXED
        | _GROUPED
        | {"residual_scale": 0.3, "logit_scale": 4.0, "embedding_scale": 3.0, "attention.scale": 0.1},
        (_attention() | _ffn(), _state_space() | _ffn(biases=True)),
    ),
    "falcon-h1": RandomFamily("falcon-h1", _HEADS | _GROUPED, (_attention() | _state_space() | _ffn(),) * 2),
    "qwen35": RandomFamily(
        "qwen35",
        _NEXT,
        (
            _delta_net(interleaved=False) | _ffn(_POST),
            _attention(gated=True, norms=True, biases=True) | _ffn(_POST),
        ),
    ),
    "qwen35moe": RandomFamily(
        "qwen35moe",
        _NEXT | _EXPERTS | {"expert_shared_feed_forward_length": SHARED},
        (
            _delta_net(interleaved=False) | _experts(_POST) | _shared(gated=True),
            _attention(gated=True, norms=True) | _experts(_POST, together=True) | _shared(gated=True),
        ),
    ),
    "qwen3next": RandomFamily(
        "qwen3next",
        _NEXT | _EXPERTS | {"expert_shared_feed_forward_length": SHARED},
        (
            _delta_net(interleaved=True) | _experts(_POST) | _shared(gated=True),
            _attention(gated=True, norms=True) | _experts(_POST) | _shared(gated=True),
        ),
    ),
    "qwen3next-older": RandomFamily(
        "qwen3next",
        _HEADS
        | _GROUPED
        | _EXPERTS
        | {"full_attention_interval": 2, "expert_shared_feed_forward_length": SHARED},
        (
            _delta_net(interleaved=True, older=True) | _experts(_POST) | _shared(gated=True),
            _attention(gated=True, norms=True) | _experts(_POST) | _shared(gated=True),
        ),
    ),
    # Streams, inputs of layers, gates that depend on all neurons, layers without keys.
    "gemma3n": RandomFamily(
        "gemma3n",
        _GEMMA
        | {
            "embedding_length_per_layer_input": INPUT,
            "attention.shared_kv_layers": 2,
            "altup.num_inputs": STREAMS,
            "altup.active_idx": 1,
            "activation_sparsity_scale": [0.7, float("-inf"), float("-inf"), 0.9],
        },
        (_gemma() | _altup(), _gemma() | _altup(), _gemma() | _altup(), _gemma(keys=False) | _altup()),
        more=_inputs(4)
        | {
            "altup_proj.weight": (STREAMS - 1, WIDTH, WIDTH),
            "altup_unembd_proj.weight": (STREAMS - 1, WIDTH, WIDTH),
        },
    ),
    # Heads of two widths, layers without keys, which have twice the neurons, inputs of layers.
    "gemma4": RandomFamily(
        "gemma4",
        _GEMMA
        | _GEMMA4
        | {
            "embedding_length_per_layer_input": INPUT,
            "attention.shared_kv_layers": 2,
            "feed_forward_length": [NEURONS, NEURONS, 2 * NEURONS, 2 * NEURONS],
        },
        (
            _gemma(dim=LOCAL_DIM) | _own_input(),
            _gemma() | _own_input(),
            _gemma(dim=LOCAL_DIM, keys=False, neurons=2 * NEURONS) | _own_input(),
            _gemma(keys=False, neurons=2 * NEURONS) | _own_input() | {"layer_output_scale.weight": (1,)},
        ),
        more=_inputs(4) | {"rope_freqs.weight": (DIM // 2,)},
    ),
    # Keys that are values, too, and heads of keys that differ in number.
    "gemma4-plain": RandomFamily(
        "gemma4",
        _GEMMA
        | _GEMMA4
        | {
            "attention.head_count_kv": [3, 1, 3, 1],
            "attention.shared_kv_layers": 0,
            "embedding_length_per_layer_input": 0,
        },
        (_gemma(dim=LOCAL_DIM, kv_heads=3), _gemma(values=False)) * 2,
        more={"rope_freqs.weight": (DIM // 2,)},
    ),
    # Experts beside the FFN, each with norms of their own; the last layer has none.
    "gemma4-experts": RandomFamily(
        "gemma4",
        _GEMMA
        | _GEMMA4
        | _EXPERTS
        | {"attention.shared_kv_layers": 0, "embedding_length_per_layer_input": 0},
        (
            _gemma(dim=LOCAL_DIM) | _normed_experts(together=True),
            _gemma(values=False) | _normed_experts(together=False) | {"layer_output_scale.weight": (1,)},
            _gemma(dim=LOCAL_DIM) | _normed_experts(together=True),
            _gemma(),
        ),
        more={"rope_freqs.weight": (DIM // 2,)},
    ),
    # Gates of heads, layers that turn half as much, heads that differ between layers, limited gates.
    "step35": RandomFamily(
        "step35",
        _HEADS
        | _EXPERTS
        | {
            "attention.head_count": [3, 4, 2],
            "attention.head_count_kv": [1, 2, 1],
            "attention.sliding_window": 5,
            "attention.sliding_window_pattern": [0, 1, 0],
            "rope.dimension_count": DIM,
            "rope.dimension_count_swa": DIM - 4,
            "rope.freq_base_swa": 500.0,
            "expert_weights_norm": True,
            "expert_weights_scale": 2.5,
            "expert_shared_feed_forward_length": SHARED,
            "swiglu_clamp_exp": [0.0, 0.0, 0.5],
            "swiglu_clamp_shexp": [0.0, 0.4, 0.3],
        },
        (
            _attention(norms=True) | {"attn_gate.weight": (HEADS, WIDTH)} | _ffn(),
            _attention(norms=True, heads=4, kv_heads=2)
            | {"attn_gate.weight": (4, WIDTH)}
            | _experts(chosen=True)
            | _shared(gated=False),
            _attention(heads=2) | {"attn_gate.weight": (2, WIDTH)} | _experts() | _shared(gated=False),
        ),
        more={"rope_freqs.weight": ((DIM - 4) // 2,), "output.weight": (VOCABULARY, WIDTH)},
    ),
    "maple": RandomFamily(
        "maple",
        _HEADS
        | _EXPERTS
        | {
            "attention.sliding_window": 5,
            "attention.sliding_window_pattern": [1, 0],
            "swiglu_clamp_exp": [0.4, 0.7],
        },
        (_attention(norms=True) | _experts(),) * 2,
        more={"output.weight": (VOCABULARY, WIDTH)},
    ),
    # A bound of decays, gates of full rank and of latent attention's heads, limited gates.
    "bailingmoe3": RandomFamily(
        "bailingmoe3",
        _LATENT
        | _EXPERTS
        | {
            "attention.head_count": HEADS,
            "attention.head_count_kv": [1, 0],
            "attention.q_lora_rank": QUERY_RANK,
            "expert_gating_func": 2,
            "ssm.conv_kernel": LENGTH,
            "kda.head_dim": STATE,
            "kda.gate_lower_bound": -5.0,
            "expert_shared_feed_forward_length": SHARED,
            "swiglu_clamp_exp": [0.0, 0.5],
            "swiglu_clamp_shexp": [0.0, 0.4],
        },
        (
            _latent(low=True) | {"attn_gate.weight": (HEADS, WIDTH)} | _ffn(),
            _channel_delta_net(low=False) | _experts(chosen=True) | _shared(gated=False),
        ),
    ),
    "plamo2": RandomFamily(
        "plamo2",
        _MIXED | _SSM,
        (
            _fused(_attention())
            | {"attn_q_norm.weight": (HEADS, DIM), "attn_k_norm.weight": (KV_HEADS, DIM)}
            | _plamo2(),
            _head_scan() | _plamo2(),
        ),
    ),
    # No weights of norms, and the embedding is added again.
    "talkie": RandomFamily("talkie", _HEADS | {"logit_scale": 0.5}, (_talkie(),) * 2),
    "rwkv7": RandomFamily(
        "rwkv7",
        {"wkv.head_size": 12, "attention.head_count": 0, "attention.layer_norm_epsilon": 1e-5},
        (_time_mixing(9) | _channel_mixing(), _time_mixing() | _channel_mixing()),
        more={f"token_embd_norm.{end}": (WIDTH,) for end in ("weight", "bias")}
        | {"output_norm.bias": (WIDTH,)},
    ),
    "arwkv7": RandomFamily(
        "arwkv7",
        {"wkv.head_size": 9, "attention.head_count": 0},
        (_time_mixing(gated=False) | _ffn(), _time_mixing() | _ffn()),
    ),
    "gpt-oss": RandomFamily(
        "gpt-oss",
        _HEADS | _EXPERTS | {"attention.sliding_window": 5},
        (_attention(biases=True, sinks=True) | _experts(_POST, biases=True),) * 2,
    ),
    # Heads and neurons differ from layer to layer, the last is for further tokens.
    "openelm": RandomFamily(
        "openelm",
        _HEADS
        | {
            "attention.head_count": [2, 3, 4, 4],
            "attention.head_count_kv": [1, 3, 2, 2],
            "feed_forward_length": [31, 48, 20, 20],
            "nextn_predict_layers": 1,
        },
        tuple(
            _fused(_attention(norms=True, heads=heads, kv_heads=kv_heads)) | _ffn(neurons=neurons)
            for heads, kv_heads, neurons in ((2, 1, 31), (3, 3, 48), (4, 2, 20), (4, 2, 20))
        ),
    ),
    # A layer without attention, and one without FFN.
    "deci": RandomFamily(
        "deci",
        _HEADS
        | {
            "attention.head_count": [4, 0, 2],
            "attention.head_count_kv": [2, 0, 1],
            "feed_forward_length": [NEURONS, 40, 0],
        },
        (
            _attention(heads=4, kv_heads=2) | _ffn(),
            _ffn(neurons=40),
            _attention(heads=2, kv_heads=1),
        ),
    ),
    # Values of another width than keys, heads that differ between layers, dense FFNs that are not used.
    "mimo2": RandomFamily(
        "mimo2",
        _HEADS
        | _EXPERTS
        | {
            "attention.head_count_kv": [1, 3],
            "attention.value_length": VALUE,
            "attention.value_scale": 0.7,
            "attention.sliding_window": 5,
            "attention.sliding_window_pattern": [0, 1],
        },
        (
            _narrow(_attention(sinks=True)) | _experts(chosen=True) | _ffn(),
            _narrow(_attention(kv_heads=3), kv_heads=3) | _ffn(),
        ),
    ),
    # Keys and values of each head are made of those of low rank.
    "minicpm3": RandomFamily(
        "minicpm3",
        _EXPANDED | {"attention.q_lora_rank": QUERY_RANK},
        (_expanded(low=True) | _ffn(),) * 2,
    ),
    "plm": RandomFamily("plm", _EXPANDED, (_expanded(low=False) | _ffn(gated=False),) * 2),
    "deepseek32": RandomFamily(
        "deepseek32",
        _LATENT
        | _EXPERTS
        | {
            "attention.q_lora_rank": QUERY_RANK,
            "attention.indexer.top_k": 40,
            "attention.indexer.head_count": 2,
            "attention.indexer.key_length": 8,
            "expert_shared_feed_forward_length": SHARED,
        },
        (
            _latent(low=True) | _ffn() | {"indexer.proj.weight": (2, WIDTH)},
            _latent(low=True) | _experts(chosen=True) | _shared(gated=False),
        ),
    ),
    "glm-dsa": RandomFamily(
        "glm-dsa",
        _LATENT
        | _EXPERTS
        | {
            "attention.q_lora_rank": QUERY_RANK,
            "attention.indexer.top_k": 40,
            "expert_shared_feed_forward_length": SHARED,
        },
        (_latent(low=True) | _ffn(), _latent(low=True) | _experts() | _shared(gated=False)),
    ),
    # Attention without positions, and a delta net whose state decays by rows.
    "kimi-linear": RandomFamily(
        "kimi-linear",
        {key: value for key, value in _LATENT.items() if key != "expert_weights_norm"}
        | _EXPERTS
        | {
            "attention.head_count": [HEADS, 0],
            "attention.head_count_kv": [1, 0],
            "ssm.conv_kernel": LENGTH,
            "kda.head_dim": STATE,
            "expert_shared_feed_forward_length": SHARED,
        },
        (
            _latent(low=False) | _ffn(),
            _channel_delta_net() | _experts(chosen=True) | _shared(gated=False),
        ),
    ),
    "llama4": RandomFamily(
        "llama4",
        _HEADS | _EXPERTS | {"attention.sliding_window": 5, "interleave_moe_layer_step": 2},
        (_attention() | _ffn(), _attention() | _experts() | _llama4_shared()) * 2,
    ),
    # Rotary positions in the dense layer, though it attends to everything; norms by root mean square.
    "cohere2moe": RandomFamily(
        "cohere2moe",
        _HEADS
        | _EXPERTS
        | {
            "attention.sliding_window": 5,
            "leading_dense_block_count": 1,
            "expert_shared_count": 1,
            "expert_shared_feed_forward_length": SHARED,
            "logit_scale": 0.5,
        },
        (
            _attention() | _ffn("attn_norm"),
            _attention() | _experts("attn_norm", together=True) | _shared(gated=False),
        ),
    ),
    "dots1": RandomFamily(
        "dots1",
        _HEADS
        | _EXPERTS
        | {
            "leading_dense_block_count": 1,
            "expert_gating_func": 2,
            "expert_shared_feed_forward_length": SHARED,
        },
        (
            _attention(norms=True) | _ffn(),
            _attention(norms=True) | _experts(chosen=True) | _shared(gated=False),
        ),
    ),
    "deepseek2": RandomFamily(
        "deepseek2",
        _LATENT
        | _EXPERTS
        | {
            "attention.q_lora_rank": QUERY_RANK,
            "expert_gating_func": 2,
            "expert_shared_feed_forward_length": SHARED,
        },
        (_latent(low=True) | _ffn(), _latent(low=True) | _experts(chosen=True) | _shared(gated=False)),
    ),
    "mistral4": RandomFamily(
        "mistral4",
        _LATENT
        | _EXPERTS
        | {"attention.q_lora_rank": QUERY_RANK, "expert_shared_feed_forward_length": SHARED},
        (
            _latent(low=True) | _ffn(),
            _latent(low=True) | _experts(together=True) | _shared(gated=False),
        ),
    ),
    "deepseek2-lite": RandomFamily(
        "deepseek2",
        _LATENT | _EXPERTS | {"expert_shared_feed_forward_length": SHARED},
        (_latent(low=False) | _ffn(), _latent(low=False) | _experts() | _shared(gated=False)),
    ),
}


#: A router in a file of a family without experts.
ROUTED_QWEN3 = RandomFamily("qwen3", _HEADS | _EXPERTS, (_attention(norms=True) | _experts(),))


def write_random_family(
    path: Path,
    family: RandomFamily,
    seed: int = 1,
    *,
    context: int = 128,
    text: bool = False,
    activation: str | None = None,
) -> Path:
    """A file of ``family`` with weights of a scale that keeps values near one; ``text``: with tokens; and
    another ``activation`` where one is given."""
    rng, writer = np.random.default_rng(seed), GGUFWriter(path, family.name)
    if activation is not None:
        writer.add_string("powerinfer.activation", activation)
    common = {
        "block_count": len(family.layers),
        "embedding_length": WIDTH,
        "feed_forward_length": NEURONS,
        "context_length": context,
        "attention.layer_norm_rms_epsilon": 1e-5,
    }
    for key, value in (common | dict(family.metadata)).items():
        full = f"{family.name}.{key}"
        match value:
            case bool():
                writer.add_bool(full, value)
            case int():
                writer.add_uint32(full, value)
            case float():
                writer.add_float32(full, value)
            case _:
                writer.add_array(full, value)
    shapes: Shapes = {"token_embd.weight": (VOCABULARY, WIDTH), f"{family.output_norm}.weight": (WIDTH,)}
    for index, layer in enumerate(family.layers):
        shapes |= {f"blk.{index}.{name}": shape for name, shape in layer.items()}
    for name, shape in (shapes | family.more).items():
        writer.add_tensor(name, _values(rng, name, shape))
    if text:
        _add_tokens(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokens(writer: GGUFWriter) -> None:
    """A byte-level vocabulary of :data:`VOCABULARY` tokens."""
    words = ["he", "ll", "hell", "hello", "Ġh", "Ġhello", "ĠĠ", "Ã", "©"]
    tokens = ["<|end|>", *"abcdefghijklmnopqrstuvwxyz0123456789ĠĊ'!", *words]
    assert len(tokens) == VOCABULARY
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, *[1] * (VOCABULARY - 1)])
    writer.add_token_merges(["h e", "l l", "he ll", "hell o", "Ġ h", "Ġ hello", "Ġ Ġ"])
    writer.add_eos_token_id(0)


def _values(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name.endswith("ssm_a"):
        return rng.uniform(-2, -0.1, shape).astype(np.float32)
    if name.startswith("rope_freqs"):
        return rng.uniform(1, 4, shape).astype(np.float32)
    if "norm" in name:
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    scale = 0.5 if len(shape) == 1 or "conv" in name or name.startswith("token") else 1.5 / np.sqrt(shape[-1])
    return (rng.standard_normal(shape) * scale).astype(np.float32)
