"""Tiny random models, each made twice: as a ``transformers`` module and as the GGUF file that stands for it.

The file is laid out as llama.cpp's converter lays it out (tensor names, metadata, the row order of q and k,
norm weights of Gemma plus one), and holds the quantised bits of exactly the values that the module computes
with. So logits of the two may differ by arithmetic only, never by weights.
"""

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from numpy.typing import NDArray
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tiny_vocabularies import Vocabulary, bpe_vocabulary, spm_vocabulary
from tiny_weights import Weights, random_weights, vector

Family = Literal["llama", "qwen2", "gemma3"]


@dataclass(frozen=True)
class TinySpec:
    """Shape and types of one tiny model.

    ``row_type`` is that of every matrix unless ``row_types`` names its GGUF kind (``ffn_down``, …).
    ``rope_factors``: rotary frequencies scaled as Llama 3.1 does, stored as the tensor ``rope_freqs.weight``.
    ``linear_rope``: positions of global layers divided by this factor.
    """

    family: Family = "llama"
    width: int = 64
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    neurons: int = 96
    activation: str = "silu"
    tied: bool = True
    window: int = 0
    rope_base: float = 10000.0
    rope_factors: bool = False
    linear_rope: float = 1.0
    context: int = 256
    row_type: str = "F32"
    row_types: Mapping[str, str] = field(default_factory=dict)
    vocabulary: str = "gpt-2"
    seed: int = 1

    def type_of(self, kind: str) -> GGMLQuantizationType:
        """Row type of the matrices of ``kind``."""
        return GGMLQuantizationType[self.row_types.get(kind, self.row_type)]


def _family_cases() -> dict[str, TinySpec]:
    gemma = TinySpec(
        family="gemma3", layers=7, activation="gelu_tanh", window=8, rope_base=1e6, vocabulary="gemma"
    )
    return {
        "llama": TinySpec(),
        "llama-untied": TinySpec(tied=False, kv_heads=4, vocabulary="llama-bpe"),
        "llama-wide-heads": TinySpec(heads=2, kv_heads=1, head_dim=48, vocabulary="smollm"),
        "llama-relu": TinySpec(activation="relu", neurons=160, vocabulary="spm"),
        "llama-3.1-rope": TinySpec(
            rope_factors=True, rope_base=5e5, tied=False, head_dim=32, vocabulary="llama-bpe"
        ),
        "qwen2": TinySpec(family="qwen2", rope_base=1e6, vocabulary="qwen2"),
        "qwen2-untied": TinySpec(family="qwen2", tied=False, heads=6, width=96, vocabulary="qwen2"),
        "gemma3": gemma,
        "gemma3-linear-rope": TinySpec(
            family="gemma3",
            layers=7,
            activation="gelu_tanh",
            window=5,
            rope_base=1e6,
            linear_rope=8.0,
            head_dim=32,
            vocabulary="gemma",
        ),
    }


def _type_cases() -> dict[str, TinySpec]:
    cases = {
        f"llama-{name}": TinySpec(row_type=name, tied=False, neurons=192)
        for name in ("F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
    }
    large: dict[str, Any] = {
        "width": 256,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 64,
        "neurons": 512,
        "layers": 2,
    }
    for name in ("Q4_K", "Q5_K", "Q6_K"):
        cases[f"llama-{name}"] = TinySpec(row_type=name, **large)
    # What quantisers call Q4_K_M: the sensitive matrices have six bits.
    mixed = {"token_embd": "Q6_K", "attn_v": "Q6_K", "ffn_down": "Q6_K"}
    cases["qwen2-Q4_K_M"] = TinySpec(
        family="qwen2", row_type="Q4_K", row_types=mixed, vocabulary="qwen2", **large
    )
    cases["qwen2-Q4_0"] = TinySpec(
        family="qwen2", row_type="Q4_0", row_types={"token_embd": "Q8_0"}, vocabulary="qwen2"
    )
    cases["gemma3-Q4_K_M"] = TinySpec(
        family="gemma3",
        row_type="Q4_K",
        row_types=mixed,
        activation="gelu_tanh",
        window=8,
        rope_base=1e6,
        vocabulary="gemma",
        **(large | {"layers": 7}),
    )
    cases["gemma3-Q8_0"] = TinySpec(
        family="gemma3",
        row_type="Q8_0",
        activation="gelu_tanh",
        window=8,
        layers=7,
        rope_base=1e6,
        vocabulary="gemma",
    )
    return cases


#: Unquantised models, one for each trait of a family.
FAMILY_CASES: dict[str, TinySpec] = _family_cases()
#: Row types, alone and in the mixtures of real files.
TYPE_CASES: dict[str, TinySpec] = _type_cases()
CASES: dict[str, TinySpec] = FAMILY_CASES | TYPE_CASES


@dataclass(frozen=True)
class TinyModel:
    """The two forms of one model. ``values``: the dequantised tensors by GGUF name, in file order."""

    spec: TinySpec
    path: Path
    module: PreTrainedModel
    vocabulary: Vocabulary
    values: Mapping[str, NDArray[np.float32]]

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Logits [tokens, vocabulary] of ``transformers`` in float32, eager attention."""
        with torch.no_grad():
            out = self.module(torch.tensor([list(tokens)]), use_cache=False).logits[0]
        return np.asarray(out.numpy(), dtype=np.float32)

    def tokens(self, count: int, seed: int = 0) -> list[int]:
        """``count`` token ids, uniform over the vocabulary."""
        rng = np.random.default_rng([self.spec.seed, seed])
        return [int(token) for token in rng.integers(0, len(self.vocabulary.tokens), count)]


def make_tiny_model(folder: Path, spec: TinySpec, name: str = "tiny") -> TinyModel:
    """Make the module, draw its weights and write ``folder/name.gguf``."""
    vocabulary = _vocabulary(spec.vocabulary)
    module = _module(spec, vocabulary)
    module.train(False)
    tensors = dict(_tensors(spec, module))
    factors = _rope_factors(spec, module)
    if factors is not None:
        tensors["rope_freqs.weight"] = vector(factors)
    path = folder / f"{name}.gguf"
    _write(path, spec, name, vocabulary, tensors)
    return TinyModel(spec, path, module, vocabulary, {key: value.values for key, value in tensors.items()})


def _vocabulary(kind: str) -> Vocabulary:
    if kind in ("spm", "gemma"):
        return spm_vocabulary(gemma=kind == "gemma")
    return bpe_vocabulary(kind)


def _module(spec: TinySpec, vocabulary: Vocabulary) -> PreTrainedModel:
    shape: dict[str, Any] = {
        "vocab_size": len(vocabulary.tokens),
        "hidden_size": spec.width,
        "intermediate_size": spec.neurons,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "max_position_embeddings": spec.context,
        "tie_word_embeddings": spec.tied,
        "rms_norm_eps": 1e-5,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "attn_implementation": "eager",
    }
    module: PreTrainedModel
    match spec.family:
        case "llama":
            rope = {"rope_type": "default", "rope_theta": spec.rope_base}
            if spec.rope_factors:
                rope |= {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                }
            config = LlamaConfig(
                **shape, head_dim=spec.head_dim, hidden_act=spec.activation, rope_parameters=rope
            )
            module = LlamaForCausalLM(config)
        case "qwen2":
            assert spec.head_dim * spec.heads == spec.width, "Qwen2 has no head_dim of its own"
            rope = {"rope_type": "default", "rope_theta": spec.rope_base}
            module = Qwen2ForCausalLM(Qwen2Config(**shape, hidden_act=spec.activation, rope_parameters=rope))
        case "gemma3":
            module = Gemma3ForCausalLM(_gemma3_config(spec, shape))
    return module


def _gemma3_config(spec: TinySpec, shape: dict[str, Any]) -> Gemma3TextConfig:
    everywhere: dict[str, Any] = {"rope_type": "default", "rope_theta": spec.rope_base}
    if spec.linear_rope != 1.0:
        everywhere |= {"rope_type": "linear", "factor": spec.linear_rope}
    return Gemma3TextConfig(
        **shape,
        head_dim=spec.head_dim,
        query_pre_attn_scalar=spec.head_dim,
        hidden_activation="gelu_pytorch_tanh",
        sliding_window=spec.window,
        layer_types=["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(spec.layers)],
        rope_parameters={
            "full_attention": everywhere,
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    )


_GGUF_KINDS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_GEMMA3_KINDS = _GGUF_KINDS | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def _gguf_name(spec: TinySpec, name: str) -> tuple[str, str]:
    """GGUF name and kind of the parameter that ``transformers`` calls ``name``."""
    kinds = _GEMMA3_KINDS if spec.family == "gemma3" else _GGUF_KINDS
    module, _, leaf = name.rpartition(".")
    if module.startswith("model.layers."):
        layer, _, module = module.removeprefix("model.layers.").partition(".")
        return f"blk.{layer}.{kinds[module]}.{leaf}", kinds[module]
    return f"{kinds[module]}.{leaf}", kinds[module]


def _tensors(spec: TinySpec, module: PreTrainedModel) -> Iterator[tuple[str, Weights]]:
    """Draw every parameter in file order, load it into ``module`` in its own, and yield it for the file."""
    for parameter_name, parameter in module.named_parameters():
        name, kind = _gguf_name(spec, parameter_name)
        rng = np.random.default_rng([spec.seed, zlib.crc32(name.encode())])
        shape = tuple(parameter.shape)
        if len(shape) == 1:
            weights = vector(_random_vector(rng, shape[0], is_bias=name.endswith(".bias")))
        else:
            weights = random_weights(
                rng, (shape[0], shape[1]), _deviation(spec, kind, shape[1]), spec.type_of(kind)
            )
        values = weights.values
        if spec.family == "llama" and kind in ("attn_q", "attn_k"):
            # Drawn as transformers orders them; the file pairs neighbours instead of halves of a head.
            weights = weights.rows(_interleaving(shape[0], spec.head_dim))
        if spec.family == "gemma3" and kind.endswith("norm"):
            values = values - np.float32(1)
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(values))
        yield name, weights


def _random_vector(rng: np.random.Generator, length: int, *, is_bias: bool) -> NDArray[np.float32]:
    normal = rng.standard_normal(length, dtype=np.float32)
    return normal * np.float32(0.5) if is_bias else np.float32(1) + normal * np.float32(0.25)


def _deviation(spec: TinySpec, kind: str, columns: int) -> float:
    """A deviation that keeps activations near 1, attention peaked and logits spread over several units."""
    unit = 1.0 / math.sqrt(columns)
    if kind in ("attn_q", "attn_k"):
        return 1.5 * unit
    if kind == "output" or (kind == "token_embd" and (spec.tied or spec.family == "gemma3")):
        return 2.5 * unit
    return 1.0 if kind == "token_embd" else unit


def _interleaving(rows: int, head_dim: int) -> NDArray[np.int64]:
    """Row order that puts value i of a head beside value i + head_dim/2, with which it is rotated."""
    halves = np.arange(rows).reshape(-1, 2, head_dim // 2)
    return halves.swapaxes(1, 2).reshape(-1)


def _rope_factors(spec: TinySpec, module: PreTrainedModel) -> NDArray[np.float32] | None:
    """What each rotary frequency is divided by, [head_dim/2], or None where they are not scaled singly."""
    if not spec.rope_factors:
        return None
    plain = spec.rope_base ** (-np.arange(0, spec.head_dim, 2, dtype=np.float64) / spec.head_dim)
    rotary: Any = module.get_submodule("model.rotary_emb")
    factors = (plain / rotary.inv_freq.double().numpy()).astype(np.float32)
    assert factors.max() > 2.0, "no frequency is scaled: the case would test nothing"
    return np.asarray(factors, dtype=np.float32)


_FILE_TYPES = {
    "F32": LlamaFileType.ALL_F32,
    "F16": LlamaFileType.MOSTLY_F16,
    "BF16": LlamaFileType.MOSTLY_BF16,
    "Q4_0": LlamaFileType.MOSTLY_Q4_0,
    "Q4_1": LlamaFileType.MOSTLY_Q4_1,
    "Q5_0": LlamaFileType.MOSTLY_Q5_0,
    "Q5_1": LlamaFileType.MOSTLY_Q5_1,
    "Q8_0": LlamaFileType.MOSTLY_Q8_0,
    "Q4_K": LlamaFileType.MOSTLY_Q4_K_M,
    "Q5_K": LlamaFileType.MOSTLY_Q5_K_M,
    "Q6_K": LlamaFileType.MOSTLY_Q6_K,
}


def _write(
    path: Path, spec: TinySpec, name: str, vocabulary: Vocabulary, tensors: Mapping[str, Weights]
) -> None:
    writer = GGUFWriter(path, spec.family)
    writer.add_type("model")
    writer.add_name(name)
    _write_hyperparameters(writer, spec, len(vocabulary.tokens))
    writer.add_file_type(_FILE_TYPES[spec.row_type])
    writer.add_quantization_version(2)
    vocabulary.write(writer)
    for tensor_name, weights in tensors.items():
        writer.add_tensor(tensor_name, np.ascontiguousarray(weights.data), raw_dtype=weights.row_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_hyperparameters(writer: GGUFWriter, spec: TinySpec, tokens: int) -> None:
    writer.add_block_count(spec.layers)
    writer.add_context_length(spec.context)
    writer.add_embedding_length(spec.width)
    writer.add_feed_forward_length(spec.neurons)
    writer.add_head_count(spec.heads)
    writer.add_head_count_kv(spec.kv_heads)
    writer.add_rope_freq_base(spec.rope_base)
    writer.add_layer_norm_rms_eps(1e-5)
    if spec.family != "qwen2":
        writer.add_key_length(spec.head_dim)
        writer.add_value_length(spec.head_dim)
    if spec.family == "llama":
        writer.add_vocab_size(tokens)
        writer.add_rope_dimension_count(spec.head_dim)
    if spec.linear_rope != 1.0:
        writer.add_string(f"{spec.family}.rope.scaling.type", "linear")
        writer.add_rope_scaling_factor(spec.linear_rope)
    if spec.window:
        writer.add_sliding_window(spec.window)
        writer.add_rope_freq_base_swa(10000.0)
    if spec.family == "llama" and spec.activation != "silu":
        # The format has no key for it: converters of ReLU models leave it to the reader to know.
        writer.add_string("powerinfer.activation", spec.activation)
