"""Tiny random Hugging Face directories, written by ``save_pretrained``, with tokenisers trained here."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedModel

SAMPLE = (
    "The rain had stopped before the morning, and the old road to the harbour was bright with pools of "
    "water. There were 3 boats in the harbour and 250 people on none of them. She walked along the wall, "
    "counting the stones as she'd done when she was a child; 'I don't know,' he'd said, 'what will become "
    "of it in 1999.' \n\nVoilà: naïve café, 世界, and 10,000 things."
)
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_WORDS}|\p{{N}}|{_REST}"

_SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "attn_implementation": "eager",
    "experts_implementation": "eager",
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@dataclass(frozen=True)
class FolderCase:
    """A model class of ``transformers``, what its configuration has beside the common sizes, a tokeniser."""

    kind: str
    tokenizer: str
    config: dict[str, Any]
    dtype: torch.dtype = torch.float32
    shard: str = "1GB"


def _cases() -> dict[str, FolderCase]:
    plain = {"rope_type": "default", "rope_theta": 10000.0}
    return {
        "llama": FolderCase("Llama", "llama2", {}),
        "llama-sharded": FolderCase("Llama", "llama2", {"tie_word_embeddings": True}, shard="20KB"),
        "llama-biases": FolderCase("Llama", "metaspace", {"attention_bias": True, "head_dim": 10}),
        "llama-3.1": FolderCase("Llama", "llama3", {"rope_parameters": _LLAMA3_ROPE}),
        "llama-linear": FolderCase(
            "Llama", "smollm", {"rope_parameters": plain | {"rope_type": "linear", "factor": 4.0}}
        ),
        "llama-f16": FolderCase("Llama", "gpt2", {}, torch.float16),
        "llama-bf16": FolderCase("Llama", "gpt2", {}, torch.bfloat16),
        "mistral": FolderCase("Mistral", "llama2", {"sliding_window": 7}),
        "qwen2-sliding": FolderCase(
            "Qwen2", "qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
        ),
        **_expert_cases(),
        "gemma3": FolderCase(
            "Gemma3",
            "gemma",
            {
                "num_hidden_layers": 7,
                "head_dim": 16,
                "query_pre_attn_scalar": 24,
                "sliding_window": 6,
                "rope_parameters": {
                    "full_attention": plain | {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                    "sliding_attention": plain,
                },
            },
        ),
    }


def _expert_cases() -> dict[str, FolderCase]:
    mixtral = {"num_local_experts": 5, "intermediate_size": 22}
    qwen2 = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 26}
    qwen2 |= {"shared_expert_intermediate_size": 34}
    qwen3 = {"num_experts": 9, "num_experts_per_tok": 4, "moe_intermediate_size": 14, "head_dim": 10}
    window = {"use_sliding_window": True, "sliding_window": 5}
    return {
        "mixtral": FolderCase("Mixtral", "llama2", mixtral),
        "mixtral-sharded": FolderCase("Mixtral", "llama2", mixtral | {"sliding_window": 7}, shard="20KB"),
        "mixtral-f16": FolderCase("Mixtral", "llama2", mixtral, torch.float16),
        "qwen2moe": FolderCase("Qwen2Moe", "qwen2", qwen2),
        "qwen2moe-bf16": FolderCase("Qwen2Moe", "qwen2", qwen2 | {"norm_topk_prob": True}, torch.bfloat16),
        "qwen2moe-sliding": FolderCase("Qwen2Moe", "qwen2", qwen2 | window | {"max_window_layers": 2}),
        "qwen3moe": FolderCase("Qwen3Moe", "qwen2", qwen3 | {"norm_topk_prob": True}),
        "qwen3moe-sliding": FolderCase("Qwen3Moe", "qwen2", qwen3 | window, shard="20KB"),
    }


FOLDER_CASES = _cases()


@dataclass(frozen=True)
class TinyFolder:
    """A directory and what it stands for."""

    path: Path
    module: PreTrainedModel
    tokenizer: Tokenizer

    def logits(self, tokens: list[int]) -> NDArray[np.float32]:
        """Logits [tokens, vocabulary] of ``transformers``, in float32."""
        with torch.no_grad():
            out = self.module(torch.tensor([tokens]), use_cache=False).logits[0]
        return np.asarray(out.float().numpy(), dtype=np.float32)

    def greedy(self, tokens: list[int], count: int) -> list[int]:
        """The ``count`` most likely tokens after ``tokens``."""
        for _ in range(count):
            tokens = [*tokens, int(self.logits(tokens)[-1].argmax())]
        return tokens[-count:]

    def tokens(self, count: int) -> list[int]:
        """Token ids, uniform over the vocabulary."""
        return np.random.default_rng(5).integers(0, self.tokenizer.get_vocab_size(), count).tolist()


def make_folder(path: Path, case: FolderCase) -> TinyFolder:
    """Write the directory ``path``."""
    tokenizer = make_tokenizer(case.tokenizer)
    rows = tokenizer.get_vocab_size() + 5  # real embeddings have more rows than there are tokens
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    of_text = getattr(transformers, f"{case.kind}TextConfig", None)
    config_class = of_text or getattr(transformers, f"{case.kind}Config")
    values = _SIZES | special | {"vocab_size": rows} | case.config
    if "hidden_size_per_layer_input" in values:
        values["vocab_size_per_layer_input"] = rows
    config = config_class(**values)
    module_class = getattr(transformers, f"{case.kind}ForCausalLM", None)
    module = (module_class or getattr(transformers, f"{case.kind}LMHeadModel"))(config)
    _draw(module, case.dtype)
    module.train(False)
    weights = {name: value.to(case.dtype) for name, value in module.state_dict().items()}
    module.save_pretrained(path, max_shard_size=case.shard, state_dict=weights)
    save_tokenizer(path, tokenizer)
    return TinyFolder(path, module, tokenizer)


def _draw(module: PreTrainedModel, dtype: torch.dtype) -> None:
    """Weights, exact in ``dtype``: activations stay near 1, attention is peaked, logits spread over units."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in module.named_parameters():
        normal = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2:
            strong = 2.5 if name.endswith(("lm_head.weight", "embed_tokens.weight")) else 1.0
            values = (
                normal
                * (1.5 if "q_proj" in name or "k_proj" in name else strong)
                / math.sqrt(parameter.shape[-1])
            )
        elif name.endswith("bias"):
            values = normal * 0.5
        else:
            from_one = type(module).__name__ in ("GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM")
            values = normal * 0.25 + (0.0 if from_one else 1.0)
        with torch.no_grad():
            parameter.copy_(values.to(dtype))


# --- tokenisers --------------------------------------------------------------------------------------------

#: name → pre-tokeniser of a byte-level tokeniser.
_BYTE_LEVEL: dict[str, Any] = {
    "gpt2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "gpt2-prefix": lambda: pre_tokenizers.ByteLevel(add_prefix_space=True),
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "llama3": lambda: _split(_LLAMA3),
    "qwen2": lambda: _split(_QWEN2),
    "falcon": lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Punctuation("contiguous"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            pre_tokenizers.Digits(individual_digits=False),
            pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
        ]
    ),
}
TOKENIZERS = (*_BYTE_LEVEL, "llama2", "metaspace", "metaspace-always", "gemma", "unknown")


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def make_tokenizer(kind: str) -> Tokenizer:
    """A small tokeniser of one of TOKENIZERS; ids 0 to 2 are <unk>, <s> and </s>."""
    return _byte_level(kind) if kind in _BYTE_LEVEL else _character_level(kind)


def _byte_level(kind: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=kind == "llama3"))
    if kind == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _BYTE_LEVEL[kind]()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([SAMPLE], trainer)
    _finish(tokenizer, bos=kind == "llama3")
    return tokenizer


def _character_level(kind: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=kind != "unknown"))
    learner = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
    tokenizer.pre_tokenizer = learner
    letters = len({*SAMPLE})
    spelt = [f"<0x{value:02X}>" for value in range(256)] if kind != "unknown" else []
    trainer = trainers.BpeTrainer(
        vocab_size=3 + len(spelt) + letters + 60,
        special_tokens=["<unk>", "<s>", "</s>", *spelt],
        show_progress=False,
    )
    tokenizer.train_from_iterator([SAMPLE], trainer)
    document = json.loads(tokenizer.to_str())
    document["added_tokens"] = [token for token in document["added_tokens"] if token["id"] < 3]
    document["pre_tokenizer"] = None
    tokenizer = Tokenizer.from_str(json.dumps(document))
    replace = normalizers.Replace(" ", "▁")
    if kind in ("metaspace", "metaspace-always"):
        scheme = "first" if kind == "metaspace" else "always"
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    elif kind == "gemma":
        tokenizer.normalizer = replace
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
    _finish(tokenizer, bos=True)
    return tokenizer


def _finish(tokenizer: Tokenizer, *, bos: bool) -> None:
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    tokenizer.add_special_tokens(
        [
            AddedToken("<|im_start|>", normalized=False),
            AddedToken("<mask>", lstrip=True, rstrip=True, normalized=False),
        ]
    )
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
        )


def save_tokenizer(path: Path, tokenizer: Tokenizer, **settings: Any) -> None:
    """Write tokenizer.json and tokenizer_config.json into ``path``."""
    path.mkdir(exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    config = {
        "bos_token": {"content": "<s>", "special": True},
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "chat_template": "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}",
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config | settings))
