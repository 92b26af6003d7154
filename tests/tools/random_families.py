"""Random models of every row of the architecture table, with odd sizes, written from the row alone."""

from pathlib import Path

import numpy as np
from gguf import GGUFWriter

from powerinfer_tools.model.architectures import ArchitectureSpec

LAYERS, WIDTH, HEADS, KV_HEADS, HEAD_DIM, NEURONS, VOCABULARY, CONTEXT = 5, 60, 3, 1, 22, 41, 37, 64
EXPERTS, USED, SHARED = 5, 2, 23


def write_random(path: Path, spec: ArchitectureSpec, seed: int = 1, layers: int = LAYERS) -> Path:
    """A float32 model of ``spec``'s family."""
    rng = np.random.default_rng(seed)
    writer = GGUFWriter(path, spec.name)
    _write_keys(writer, spec, layers)
    for name, shape in _tensors(spec, layers).items():
        values = rng.standard_normal(shape, dtype=np.float32)
        if len(shape) > 1:
            values *= np.float32((2.0 if "attn_" in name else 1.2) / np.sqrt(shape[-1]))
        elif name.endswith("norm.weight") or "norm_2.weight" in name:
            values = np.float32(1) + values / 4
        writer.add_tensor(name, values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_keys(writer: GGUFWriter, spec: ArchitectureSpec, layers: int) -> None:
    writer.add_block_count(layers)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(NEURONS * spec.neurons_divisor)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    if spec.norm == "rms":
        writer.add_layer_norm_rms_eps(1e-5)
    else:
        writer.add_layer_norm_eps(1e-5)
    if spec.rope_style != "none":
        writer.add_rope_dimension_count(HEAD_DIM - 6)
    if spec.sliding_period or spec.sliding_everywhere:
        writer.add_sliding_window(7)
    if spec.residual_scale:
        writer.add_residual_scale(0.3)
    if spec.embedding_key:
        writer.add_embedding_scale(3.0)
    if spec.clamped_qkv:
        writer.add_clamp_kqv(0.9)
    if spec.alibi:
        writer.add_max_alibi_bias(8.0)
    if spec.indexed:
        writer.add_uint32(f"{spec.name}.attention.indexer.top_k", CONTEXT)
    if spec.activation == "xielu":
        for index, name in enumerate(("alpha_p", "alpha_n", "beta", "eps")):
            values = [(0.8, -0.4, 0.5, -1e-6)[index] * (1 + layer / 8) for layer in range(layers)]
            writer.add_array(f"{spec.name}.xielu.{name}", values)
    if spec.temperature == "by key":
        writer.add_float32(f"{spec.name}.attention.temperature_scale", 0.3)
        writer.add_uint32(f"{spec.name}.attention.temperature_length", 5)
    if spec.logit_scale != "none":
        writer.add_logit_scale(0.25)
    if _experts(spec):
        writer.add_expert_count(EXPERTS)
        writer.add_expert_used_count(USED)
        writer.add_expert_feed_forward_length(NEURONS)
    if spec.shared_expert:
        writer.add_expert_shared_feed_forward_length(SHARED)


def _experts(spec: ArchitectureSpec) -> bool:
    return spec.routed and spec.name != "llama"


def _tensors(spec: ArchitectureSpec, layers: int) -> dict[str, tuple[int, ...]]:
    tensors: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (VOCABULARY, WIDTH),
        "output.weight": (VOCABULARY, WIDTH),
    }
    if spec.position_offset is not None:
        tensors["position_embd.weight"] = (CONTEXT + spec.position_offset, WIDTH)
    if spec.embedding_norm == "weights":
        tensors |= _norm(spec, "token_embd_norm", WIDTH)
    if spec.head_bias:
        tensors["output.bias"] = (VOCABULARY,)
    tensors |= _norm(spec, spec.output_norm, WIDTH)
    for layer in range(layers):
        tensors |= {f"blk.{layer}.{name}": shape for name, shape in _layer(spec, layer).items()}
    return tensors


def _layer(spec: ArchitectureSpec, index: int) -> dict[str, tuple[int, ...]]:
    queries, keys = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    parts = {"attn_q": queries, "attn_k": keys, "attn_v": keys}
    rows = {"attn_qkv": queries + 2 * keys} if spec.fused_qkv else parts
    tensors: dict[str, tuple[int, ...]] = {f"{name}.weight": (count, WIDTH) for name, count in rows.items()}
    tensors |= {f"{name}.bias": (count,) for name, count in rows.items()}
    tensors |= {"attn_output.weight": (WIDTH, queries), "attn_output.bias": (WIDTH,)}
    if spec.attention_gate == "matrix":  # of values, or of heads
        tensors["attn_gate.weight"] = (queries if index % 2 else HEADS, WIDTH)
    if spec.inner_norms:
        tensors |= {"attn_sub_norm.weight": (queries,), "ffn_sub_norm.weight": (NEURONS,)}
    if spec.sinks:
        tensors["attn_sinks.weight"] = (HEADS,)
    for name in {*spec.attention_norms, spec.ffn_norm, spec.beside_norm} - {""}:
        tensors |= _norm(spec, name, WIDTH)
    if spec.qk_norm == "own heads":
        # GGUF files leave out a last dimension of 1.
        tensors |= {"attn_q_norm.weight": (HEADS, HEAD_DIM), "attn_k_norm.weight": (KV_HEADS * HEAD_DIM,)}
    if spec.qk_norm in ("heads", "row"):
        widths = (queries, keys) if spec.qk_norm == "row" else (HEAD_DIM, HEAD_DIM)
        tensors |= {"attn_q_norm.weight": (widths[0],), "attn_k_norm.weight": (widths[1],)}
    if spec.post_norms:
        tensors |= {f"{names[0]}.weight": (WIDTH,) for names in spec.post_norm_names}
    if _experts(spec):
        return tensors | _expert_tensors(spec)
    if spec.gated and spec.gated_biases:
        tensors |= {"ffn_gate.bias": (NEURONS,), "ffn_up.bias": (NEURONS,), "ffn_down.bias": (WIDTH,)}
    tensors |= {"ffn_up.weight": (NEURONS * (2 if spec.fused_gate else 1), WIDTH)}
    tensors |= {"ffn_down.weight": (WIDTH, NEURONS)}
    if spec.gated:
        return tensors | ({} if spec.fused_gate else {"ffn_gate.weight": (NEURONS, WIDTH)})
    return tensors | {"ffn_up.bias": (NEURONS,), "ffn_down.bias": (WIDTH,)}


def _expert_tensors(spec: ArchitectureSpec) -> dict[str, tuple[int, ...]]:
    tensors: dict[str, tuple[int, ...]] = {"ffn_gate_inp.weight": (EXPERTS, WIDTH)}
    for kind, shape in {"gate": (NEURONS, WIDTH), "up": (NEURONS, WIDTH), "down": (WIDTH, NEURONS)}.items():
        tensors[f"ffn_{kind}_exps.weight"] = (EXPERTS, *shape)
    if spec.dense_beside != "none":
        neurons = WIDTH if spec.dense_beside == "square" else NEURONS
        tensors |= {"ffn_gate.weight": (neurons, WIDTH), "ffn_up.weight": (neurons, WIDTH)}
        tensors["ffn_down.weight"] = (WIDTH, neurons)
    if spec.shared_expert:
        tensors["ffn_gate_inp_shexp.weight"] = (WIDTH,)
        for kind, shape in {"gate": (SHARED, WIDTH), "up": (SHARED, WIDTH), "down": (WIDTH, SHARED)}.items():
            tensors[f"ffn_{kind}_shexp.weight"] = shape
    return tensors


def _norm(spec: ArchitectureSpec, name: str, size: int) -> dict[str, tuple[int, ...]]:
    bias = {} if spec.norm == "rms" and not spec.rms_biases else {f"{name}.bias": (size,)}
    return {f"{name}.weight": (size,)} | bias
