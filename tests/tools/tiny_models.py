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
from transformers import PreTrainedModel

from tiny_families import (
    expert_names,
    gguf_name,
    is_expert,
    make_module,
    row_order,
    stored_one_above,
    write_family_keys,
)
from tiny_vocabularies import Vocabulary, bpe_vocabulary, spm_vocabulary
from tiny_weights import Weights, random_weights, vector

Family = Literal[
    "llama",
    "mixtral",
    "qwen2moe",
    "qwen3moe",
    "mistral",
    "arcee",
    "smollm3",
    "bamboo",
    "qwen2",
    "qwen3",
    "gemma3",
    "opt",
    "falcon",
    "nemotron",
]


@dataclass(frozen=True)
class TinySpec:
    """Shape and types of one tiny model.

    ``row_type`` is that of every matrix unless ``row_types`` names its GGUF kind (``ffn_down``, …).
    ``cut`` is what a gate must be above with fatrelu. ``rope_factors``: rotary frequencies scaled as Llama
    3.1 does, stored as the tensor ``rope_freqs.weight``. ``linear_rope``: positions of global layers divided
    by this factor. ``two_norms``: Falcon's attention has a norm of its own.
    """

    family: Family = "llama"
    width: int = 64
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    neurons: int = 96
    activation: str = "silu"
    cut: float = 0.0
    tied: bool = True
    window: int = 0
    rope_base: float = 10000.0
    rope_factors: bool = False
    linear_rope: float = 1.0
    two_norms: bool = False
    experts: int = 0
    experts_used: int = 2
    shared_neurons: int = 0
    context: int = 256
    row_type: str = "F32"
    row_types: Mapping[str, str] = field(default_factory=dict)
    vocabulary: str = "gpt-2"
    seed: int = 1

    @property
    def architecture(self) -> str:
        """``general.architecture`` of the file."""
        return "llama" if self.family in ("mistral", "mixtral") else self.family

    def type_of(self, kind: str) -> GGMLQuantizationType:
        """Row type of the matrices of ``kind``."""
        chosen = "F32" if kind == "ffn_gate_inp" else self.row_types.get(kind, self.row_type)
        return GGMLQuantizationType[chosen]


def _family_cases() -> dict[str, TinySpec]:
    gemma = TinySpec(
        family="gemma3", layers=7, activation="gelu_tanh", window=8, rope_base=1e6, vocabulary="gemma"
    )
    return {
        "llama": TinySpec(),
        "llama-untied": TinySpec(tied=False, kv_heads=4, vocabulary="llama-bpe"),
        "llama-wide-heads": TinySpec(heads=2, kv_heads=1, head_dim=48, vocabulary="smollm"),
        "llama-relu": TinySpec(activation="relu", neurons=160, vocabulary="spm"),
        "llama-fatrelu": TinySpec(activation="fatrelu", cut=0.01, neurons=100, vocabulary="spm"),
        "llama-3.1-rope": TinySpec(
            rope_factors=True, rope_base=5e5, tied=False, head_dim=32, vocabulary="llama-bpe"
        ),
        "qwen2": TinySpec(family="qwen2", rope_base=1e6, vocabulary="qwen2"),
        "qwen2-untied": TinySpec(family="qwen2", tied=False, heads=6, width=96, vocabulary="qwen2"),
        "qwen3": TinySpec(family="qwen3", rope_base=1e6, head_dim=24, neurons=100, vocabulary="qwen2"),
        "mistral": TinySpec(family="mistral", rope_base=1e6, vocabulary="spm"),
        "bamboo": TinySpec(family="bamboo", activation="drelu", neurons=100, vocabulary="spm"),
        "arcee": TinySpec(
            family="arcee", head_dim=20, neurons=100, activation="relu2", tied=False, vocabulary="llama-bpe"
        ),
        # Layer 3 of five has no rotary positions.
        "smollm3": TinySpec(family="smollm3", layers=5, kv_heads=1, rope_base=2e6, vocabulary="llama-bpe"),
        "opt": TinySpec(
            family="opt", width=60, heads=3, kv_heads=3, head_dim=20, neurons=90, activation="relu"
        ),
        "falcon": TinySpec(family="falcon", kv_heads=1, neurons=100, activation="gelu_erf"),
        "falcon-relu": TinySpec(
            family="falcon", width=80, heads=4, head_dim=20, two_norms=True, neurons=120, activation="relu"
        ),
        "falcon-one-norm": TinySpec(family="falcon", activation="gelu_erf", tied=False),
        # With some seeds a token is nearly tied between two experts, and rounding sends it to the other one.
        "mixtral": TinySpec(family="mixtral", experts=5, neurons=40, vocabulary="spm", seed=2),
        "qwen2moe": TinySpec(
            family="qwen2moe", experts=6, experts_used=3, neurons=36, shared_neurons=52, vocabulary="qwen2"
        ),
        "qwen3moe": TinySpec(
            family="qwen3moe", experts=8, experts_used=3, neurons=20, head_dim=24, vocabulary="qwen2"
        ),
        "nemotron": TinySpec(
            family="nemotron", head_dim=24, neurons=100, activation="relu2", tied=False, vocabulary="spm"
        ),
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
    cases["opt-Q4_0"] = TinySpec(
        family="opt", kv_heads=4, row_type="Q4_0", neurons=160, activation="relu", vocabulary="gpt-2"
    )
    cases["opt-Q6_K"] = TinySpec(
        family="opt", row_type="Q6_K", activation="relu", **(large | {"kv_heads": 4})
    )
    cases["falcon-Q8_0"] = TinySpec(
        family="falcon", row_type="Q8_0", two_norms=True, neurons=160, activation="relu"
    )
    cases["mixtral-Q4_0"] = TinySpec(
        family="mixtral", row_type="Q4_0", layers=2, experts=4, neurons=64, vocabulary="spm", seed=2
    )
    cases["qwen2moe-Q8_0"] = TinySpec(
        family="qwen2moe", row_type="Q8_0", experts=6, neurons=32, shared_neurons=96, vocabulary="qwen2"
    )
    cases["bamboo-Q4_1"] = TinySpec(
        family="bamboo", row_type="Q4_1", neurons=160, activation="drelu", vocabulary="spm"
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
    module = make_module(spec, len(vocabulary.tokens))
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


def _tensors(spec: TinySpec, module: PreTrainedModel) -> Iterator[tuple[str, Weights]]:
    """Draw every parameter in file order, load it into ``module`` in its own, and yield it for the file."""
    for parameter_name, parameter in module.named_parameters():
        if is_expert(parameter_name):
            yield from _expert_tensors(spec, parameter_name, parameter)
            continue
        name, kind = gguf_name(spec, parameter_name)
        rng = np.random.default_rng([spec.seed, zlib.crc32(name.encode())])
        shape = tuple(parameter.shape)
        if len(shape) == 1:
            weights = vector(_random_vector(rng, shape[0], is_bias=name.endswith(".bias")))
        else:
            weights = random_weights(
                rng, (shape[0], shape[1]), _deviation(spec, kind, shape[1]), spec.type_of(kind)
            )
        values = weights.values
        order = row_order(spec, kind, shape[0])
        if order is not None:
            weights = weights.rows(order)
        if stored_one_above(spec, name):
            values = values - np.float32(1)
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(values))
        yield name, weights


def _expert_tensors(
    spec: TinySpec, parameter_name: str, parameter: torch.nn.Parameter
) -> Iterator[tuple[str, Weights]]:
    """Stacks of matrices, of which transformers has gate and up in one, and the vector of the shared gate."""
    parts = []
    for name, kind in expert_names(parameter_name):
        rng = np.random.default_rng([spec.seed, zlib.crc32(name.encode())])
        if kind == "ffn_gate_inp_shexp":
            weights = vector(rng.standard_normal(spec.width, dtype=np.float32) * np.float32(0.3))
            parts.append(weights.values[None])
        else:
            rows, columns = (spec.width, spec.neurons) if "down" in kind else (spec.neurons, spec.width)
            flat = random_weights(rng, (spec.experts * rows, columns), columns**-0.5, spec.type_of(kind))
            data = flat.data.reshape(spec.experts, rows, -1)
            weights = Weights(flat.row_type, data, flat.values.reshape(spec.experts, rows, columns))
            parts.append(weights.values)
        yield name, weights
    with torch.no_grad():
        parameter.copy_(torch.from_numpy(np.concatenate(parts, axis=-2)))


def _random_vector(rng: np.random.Generator, length: int, *, is_bias: bool) -> NDArray[np.float32]:
    normal = rng.standard_normal(length, dtype=np.float32)
    return normal * np.float32(0.5) if is_bias else np.float32(1) + normal * np.float32(0.25)


def _deviation(spec: TinySpec, kind: str, columns: int) -> float:
    """A deviation that keeps activations near 1, attention peaked and logits spread over several units."""
    unit = 1.0 / math.sqrt(columns)
    if kind in ("attn_q", "attn_k", "attn_qkv"):
        return 1.5 * unit
    if kind == "output" or (kind == "token_embd" and (spec.tied or spec.family == "gemma3")):
        return 2.5 * unit
    return 1.0 if kind == "token_embd" else unit


def _rope_factors(spec: TinySpec, module: PreTrainedModel) -> NDArray[np.float32] | None:
    """What each rotary frequency is divided by, [head_dim/2], or None where they are not scaled singly."""
    if not spec.rope_factors:
        return None
    plain = spec.rope_base ** (-np.arange(0, spec.head_dim, 2, dtype=np.float64) / spec.head_dim)
    rotary: Any = module.get_submodule("model.rotary_emb")
    factors = (plain / rotary.inv_freq.double().numpy()).astype(np.float32)
    assert factors.max() > 2.0, "no frequency is scaled: the case would test nothing"
    return np.asarray(factors, dtype=np.float32)


#: What a family's files do not say.
_OWN_ACTIVATION = {
    "arcee": "relu2",
    "bamboo": "drelu",
    "gemma3": "gelu_tanh",
    "opt": "relu",
    "falcon": "gelu_erf",
    "nemotron": "relu2",
}
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
    writer = GGUFWriter(path, spec.architecture)
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
    write_family_keys(writer, spec, tokens)
    if spec.linear_rope != 1.0:
        writer.add_string(f"{spec.family}.rope.scaling.type", "linear")
        writer.add_rope_scaling_factor(spec.linear_rope)
    if spec.window:
        writer.add_sliding_window(spec.window)
        writer.add_rope_freq_base_swa(10000.0)
    if spec.activation != _OWN_ACTIVATION.get(spec.family, "silu"):
        # The format has no key for it: converters of ReLU models leave it to the reader to know.
        writer.add_string("powerinfer.activation", spec.activation)
    if spec.cut:
        writer.add_float32("powerinfer.activation_threshold", spec.cut)
