"""The families of Hugging Face directories, as data: names and settings of theirs → those of GGUF.

One row per model. Sources: the configuration and modelling files of the ``transformers`` package for the left
sides and defaults, llama.cpp's converter for the right sides.
"""

from collections.abc import Mapping
from dataclasses import replace

from powerinfer_tools.errors import ModelError
from powerinfer_tools.model.huggingface.changes import grouped, interleaved, plus_one
from powerinfer_tools.model.huggingface.config import Config
from powerinfer_tools.model.huggingface.dense_families import DENSE
from powerinfer_tools.model.huggingface.expert_families import EXPERTS, MIXTRAL
from powerinfer_tools.model.huggingface.family import (
    EMBEDDING,
    FFN,
    HEAD_NORMS,
    LAYER,
    NORMS,
    Family,
    Rule,
    Setting,
    attention,
    both,
    every_layer,
    one_more,
    sizes,
)
from powerinfer_tools.model.huggingface.gemma_families import GEMMAS
from powerinfer_tools.model.huggingface.older_families import OLDER
from powerinfer_tools.model.huggingface.recurrent_families import RECURRENT
from powerinfer_tools.model.huggingface.sigmoid_families import SIGMOIDS
from powerinfer_tools.model.huggingface.state_space_families import STATE_SPACES

#: config.json's names of activations → ours.
ACTIVATIONS: Mapping[str, str] = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "relu2": "relu2",
    "relu_squared": "relu2",
    "gelu": "gelu_erf",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "fatrelu": "fatrelu",
    "xielu": "xielu",
}


_LLAMA = (EMBEDDING, *NORMS, *attention(interleaved), *FFN)
_ARCEE = (EMBEDDING, *NORMS, *attention(interleaved), *FFN[1:])
_QWEN = (EMBEDDING, *NORMS, *attention(), *FFN)
_GEMMA3_NORMS = (
    Rule("output_norm.weight", "model.norm.weight"),
    Rule("blk.{i}.attn_norm.weight", f"{LAYER}.input_layernorm.weight"),
    Rule("blk.{i}.post_attention_norm.weight", f"{LAYER}.post_attention_layernorm.weight"),
    Rule("blk.{i}.ffn_norm.weight", f"{LAYER}.pre_feedforward_layernorm.weight"),
    Rule("blk.{i}.post_ffw_norm.weight", f"{LAYER}.post_feedforward_layernorm.weight"),
    *HEAD_NORMS,
)


def _qwen_layers(config: Config, index: int) -> bool:
    first = config.integer("max_window_layers", 28, low=0, high=4096)
    return config.flag("use_sliding_window", False) and index >= first


def _gemma3_layers(config: Config, index: int) -> bool:
    period = config.integer("sliding_window_pattern", 6, high=4096)
    return (index + 1) % period != 0


_OPT_LAYER = "model.decoder.layers.{i}"
_OPT = (
    Rule("token_embd.weight", "model.decoder.embed_tokens.weight"),
    Rule("position_embd.weight", "model.decoder.embed_positions.weight"),
    *both("output_norm", "model.decoder.final_layer_norm"),
    *both("blk.{i}.attn_norm", f"{_OPT_LAYER}.self_attn_layer_norm"),
    *both("blk.{i}.ffn_norm", f"{_OPT_LAYER}.final_layer_norm"),
    *both("blk.{i}.attn_q", f"{_OPT_LAYER}.self_attn.q_proj"),
    *both("blk.{i}.attn_k", f"{_OPT_LAYER}.self_attn.k_proj"),
    *both("blk.{i}.attn_v", f"{_OPT_LAYER}.self_attn.v_proj"),
    *both("blk.{i}.attn_output", f"{_OPT_LAYER}.self_attn.out_proj"),
    *both("blk.{i}.ffn_up", f"{_OPT_LAYER}.fc1"),
    *both("blk.{i}.ffn_down", f"{_OPT_LAYER}.fc2"),
)
_FALCON_LAYER = "transformer.h.{i}"
# The norms are those of 7B (one), 11B (the same name in the newer form) and of 40B and 180B (two).
_FALCON = (
    Rule("token_embd.weight", "transformer.word_embeddings.weight"),
    *both("output_norm", "transformer.ln_f"),
    *both("blk.{i}.attn_norm", f"{_FALCON_LAYER}.input_layernorm", optional=True),
    *both("blk.{i}.attn_norm", f"{_FALCON_LAYER}.ln_mlp", optional=True),
    *both("blk.{i}.attn_norm_2", f"{_FALCON_LAYER}.ln_attn", optional=True),
    *(
        replace(rule, change=grouped)
        for rule in both("blk.{i}.attn_qkv", f"{_FALCON_LAYER}.self_attention.query_key_value")
    ),
    *both("blk.{i}.attn_output", f"{_FALCON_LAYER}.self_attention.dense"),
    *both("blk.{i}.ffn_up", f"{_FALCON_LAYER}.mlp.dense_h_to_4h"),
    *both("blk.{i}.ffn_down", f"{_FALCON_LAYER}.mlp.dense_4h_to_h"),
)
_NEMOTRON_NORMS = tuple(
    rule
    for norm in NORMS
    for rule in (
        replace(norm, change=plus_one),
        replace(
            norm, name=norm.name.replace(".weight", ".bias"), stored=norm.stored.replace(".weight", ".bias")
        ),
    )
)
_NEMOTRON = (
    EMBEDDING,
    *_NEMOTRON_NORMS,
    *attention(),
    *both("blk.{i}.ffn_up", f"{LAYER}.mlp.up_proj"),
    *both("blk.{i}.ffn_down", f"{LAYER}.mlp.down_proj"),
)


def _falcon_key_heads(config: Config) -> int:
    heads = config.integer("num_attention_heads", high=4096)
    if config.flag("new_decoder_architecture", False):
        return config.integer("num_kv_heads", heads, high=4096)
    return 1 if config.flag("multi_query", True) else heads


def _falcon_neurons(config: Config) -> int:
    return config.integer("ffn_hidden_size", 4 * config.integer("hidden_size", high=1 << 20), high=1 << 22)


_GEMMA3 = Family(
    "gemma3_text",
    ("Gemma3ForCausalLM", "Gemma3TextModel"),
    "gemma3",
    sizes(
        num_hidden_layers=26,
        hidden_size=2304,
        intermediate_size=9216,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        max_position_embeddings=131072,
    ),
    (EMBEDDING, *one_more(_GEMMA3_NORMS), *attention(), *FFN),
    # As a text model, and inside of an image model in the old and the new order of names.
    spellings=("model.", "language_model.model.", "model.language_model."),
    activation_name="hidden_activation",
    activation="gelu_pytorch_tanh",
    tied=True,
    rope_base=1e6,
    window=4096,
    sliding=_gemma3_layers,
    fixed=(("use_bidirectional_attention", False),),
    ignored=(
        "vision_tower.",
        "multi_modal_projector.",
        "model.vision_tower.",
        "model.multi_modal_projector.",
    ),
)

_MISTRAL_PICTURES = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_")
_BAMBOO_CHANGES = (("relu", "drelu"),)  # its code applies it to gate and up
_OPT_FAMILY = Family(
    "opt",
    ("OPTForCausalLM",),
    "opt",
    (
        *(row for row in sizes() if row.name in ("num_hidden_layers", "hidden_size", "num_attention_heads")),
        Setting("feed_forward_length", "ffn_dim", high=1 << 22),
        Setting("context_length", "max_position_embeddings", 2048, high=1 << 31),
    ),
    _OPT,
    spellings=("model.", ""),
    activation_name="activation_function",
    activation="relu",
    tied=True,
    norm_name="",
    norm_eps=1e-5,
    fixed=(
        ("do_layer_norm_before", True),
        ("_remove_final_layer_norm", False),
        ("layer_norm_elementwise_affine", True),
    ),
    same=(("word_embed_proj_dim", "hidden_size"),),
    reasons=(
        ("do_layer_norm_before", "norms after attention and FFN, as opt-350m has them"),
        ("word_embed_proj_dim", "embeddings of a width of their own, with project_in and project_out"),
    ),
)
_FALCON_FAMILY = Family(
    "falcon",
    ("FalconForCausalLM",),
    "falcon",
    (
        *(row for row in sizes() if row.name in ("num_hidden_layers", "hidden_size", "num_attention_heads")),
        Setting("feed_forward_length", "ffn_hidden_size", derive=_falcon_neurons),
        Setting("attention.head_count_kv", "num_kv_heads", derive=_falcon_key_heads),
        Setting("context_length", "max_position_embeddings", 2048, high=1 << 31),
    ),
    _FALCON,
    activation_name="activation",
    activation="gelu",
    tied=True,
    norm_name="layer_norm_epsilon",
    norm_eps=1e-5,
    fixed=(("alibi", False), ("parallel_attn", True)),
)

FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama", ("LlamaForCausalLM",), "llama", sizes(), _LLAMA, fixed=(("mlp_bias", False),)),
        # ProSparse: Llama 2 with a class of its own for its activation.
        Family("sparsellama", ("SparseLlamaForCausalLM",), "llama", sizes(), _LLAMA,
               activation="fatrelu"),
        # SparseLM: its configuration says silu, its code computes ReLU.
        Family("llama_sparse_relu", ("SparseLlamaForCausalLM",), "llama", sizes(), _LLAMA,
               activation="relu", activations=(("silu", "relu"),),
               fixed=(("mlp_bias", False), ("sparsity_gated_mlp", True), ("sparsity_baseline_run", False),
                      ("rope_interleaved", False))),
        Family("bamboo", ("BambooForCausalLM",), "bamboo", sizes(num_key_value_heads=8), _LLAMA,
               activation="relu", activations=_BAMBOO_CHANGES, sliding=every_layer),
        Family("mistral", ("MistralForCausalLM",), "llama", sizes(num_key_value_heads=8), _LLAMA,
               window=4096, sliding=every_layer, ignored=_MISTRAL_PICTURES),
        Family("arcee", ("ArceeForCausalLM",), "arcee", sizes(), _ARCEE, activation="relu2",
               norm_eps=1e-5, fixed=(("mlp_bias", False),)),
        Family("smollm3", ("SmolLM3ForCausalLM",), "smollm3", sizes(num_key_value_heads=4), _LLAMA, tied=True,
               rope_base=2e6, fixed=(("mlp_bias", False), ("no_rope_layer_interval", 4)),
               rotary_layers="no_rope_layers", window=0, sliding=_qwen_layers),
        Family("qwen2", ("Qwen2ForCausalLM",), "qwen2", sizes(num_key_value_heads=32), _QWEN,
               window=4096, sliding=_qwen_layers),
        Family("qwen3", ("Qwen3ForCausalLM",), "qwen3", sizes(num_key_value_heads=32, head_dim=128),
               (*_QWEN, *HEAD_NORMS), window=4096, sliding=_qwen_layers),
        MIXTRAL,
        _GEMMA3,
        _OPT_FAMILY,
        _FALCON_FAMILY,
        *DENSE,
        *GEMMAS,
        *OLDER,
        *EXPERTS,
        *SIGMOIDS,
        *RECURRENT,
        *STATE_SPACES,
        Family("nemotron", ("NemotronForCausalLM",), "nemotron", sizes(), _NEMOTRON, activation="relu2",
               norm_name="norm_eps", norm_eps=1e-5, rotary_share=0.5),
    )
}  # fmt: skip

#: Directories whose class computes something else than the model type says: TurboSparse-Mixtral's applies
#: ReLU to gate and up (arXiv 2406.05955).
_BY_CLASS = {
    "SuperSparseMixtralForCausalLM": replace(
        MIXTRAL, classes=("SuperSparseMixtralForCausalLM",), activation="relu", activations=_BAMBOO_CHANGES
    )
}

#: Models of text and images: the section of config.json with the text model, the classes that have it, and
#: what kind it is where it does not say.
_TEXT_SECTIONS = {
    "gemma3": ("text_config", "Gemma3ForConditionalGeneration", "gemma3_text"),
    "gemma3n": ("text_config", "Gemma3nForConditionalGeneration", "gemma3n_text"),
    "gemma4": ("text_config", "Gemma4ForConditionalGeneration", "gemma4_text"),
    "llama4": ("text_config", "Llama4ForConditionalGeneration", "llama4_text"),
    "mistral3": ("text_config", "Mistral3ForConditionalGeneration", "mistral"),
    "qwen3_5": ("text_config", "Qwen3_5ForConditionalGeneration", "qwen3_5_text"),
    "qwen3_5_moe": ("text_config", "Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe_text"),
    "qwen3_vl": ("text_config", "Qwen3VLForConditionalGeneration", "qwen3_vl_text"),
    "qwen3_vl_moe": ("text_config", "Qwen3VLMoeForConditionalGeneration", "qwen3_vl_moe_text"),
    "qwen2_5_vl": ("text_config", "Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl_text"),
    "qwen2_vl": ("text_config", "Qwen2VLForConditionalGeneration", "qwen2_vl_text"),
}


def find_family(config: Config) -> tuple[Family, Config]:
    """The row for a config.json, and the (part of the) document that describes the text model.

    Raises ModelError for a family or class that is not supported. Code that a directory brings along
    (``auto_map``) is never run: a class of its own is refused.
    """
    kind = config.text("model_type")
    classes: tuple[str, ...]
    if kind in _TEXT_SECTIONS:
        section, name, usual = _TEXT_SECTIONS[kind]
        config_of_text, classes = config.section(section), (name,)
        kind = config_of_text.text("model_type", usual)
        family = _row(config, kind)
    else:
        family = _row(config, kind)
        named = config.items("architectures")
        other = _BY_CLASS.get(str(named[0])) if named else None
        family = other if other is not None and other.model_type == kind else family
        classes, config_of_text = family.classes, config
    if family.without_experts is not None and not _has_experts(family, config_of_text):
        family = family.without_experts
    named = config.items("architectures")
    # The same without a head: a language model where the head is the embedding, else one that lacks a tensor.
    bare = tuple(
        name.removesuffix("ForCausalLM") + "Model" for name in classes if name.endswith("ForCausalLM")
    )
    if named and named[0] not in (*classes, *bare):
        raise ModelError(
            f"{config.file}: architecture {str(named[0])[:80]!r} is not supported for the model type "
            f"{kind!r} (supported: {', '.join(classes)}); code in the directory is never run"
        )
    return family, config_of_text


def _has_experts(family: Family, config: Config) -> bool:
    if family.has_experts is not None:
        return family.has_experts(config)
    count = next(setting.name for setting in family.settings if setting.key == "expert_count")
    return bool(config.get(count) != 0)


def _row(config: Config, kind: str) -> Family:
    if kind not in FAMILIES:
        supported = ", ".join(sorted({*FAMILIES, *_TEXT_SECTIONS}))
        raise ModelError(f"{config.file}: model type {kind[:80]!r} is not supported (supported: {supported})")
    return FAMILIES[kind]
