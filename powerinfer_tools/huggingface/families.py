"""The families of Hugging Face directories, as data: names and settings of theirs → those of GGUF.

One row per model. Sources: the configuration and modelling files of the ``transformers`` package for the left
sides and defaults, llama.cpp's converter for the right sides.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from powerinfer_tools.errors import ModelError
from powerinfer_tools.huggingface.changes import Change, grouped, interleaved, plus_one
from powerinfer_tools.huggingface.config import Config


@dataclass(frozen=True)
class Setting:
    """A whole number of config.json: GGUF ``key`` (below the architecture's prefix) ← ``name``.

    ``default``: what the family assumes where the file says nothing, 0 to leave the key out; None: it has to
    say. ``derive``: the number by other settings, where ``name`` alone does not tell.
    """

    key: str
    name: str
    default: int | None = None
    high: int = 1 << 24
    derive: Callable[[Config], int] | None = None


@dataclass(frozen=True)
class Rule:
    """GGUF tensor ``name`` ← tensor ``stored``; "{i}" is the layer in both."""

    name: str
    stored: str
    change: Change | None = None
    optional: bool = False


@dataclass(frozen=True)
class Family:
    """One kind of directory. ``classes``: what ``architectures`` may name; other code would be another model.

    ``spellings``: what the "model." in front of stored names may be instead. ``sliding``: which layers see
    only ``sliding_window`` positions, where ``layer_types`` does not say. ``fixed``: settings of which one
    value is supported (null and absent count as it); ``same``: settings that must equal another; ``reasons``:
    what other values of those would mean. ``ignored``: beginnings of tensor names that no text
    model needs. ``rotary_share``: the part of a head that is rotated. ``activations``: names that mean
    something else in this family.
    """

    model_type: str
    classes: tuple[str, ...]
    architecture: str
    settings: tuple[Setting, ...]
    rules: tuple[Rule, ...]
    spellings: tuple[str, ...] = ("model.",)
    activation_name: str = "hidden_act"
    activation: str = "silu"
    tied: bool = False
    rope_base: float = 10000.0
    norm_name: str = "rms_norm_eps"
    norm_eps: float = 1e-6
    rotary_share: float = 1.0
    activations: tuple[tuple[str, str], ...] = ()
    window: int = 0
    sliding: Callable[[Config, int], bool] | None = None
    fixed: tuple[tuple[str, object], ...] = ()
    same: tuple[tuple[str, str], ...] = ()
    reasons: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()


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
}


def _settings(**defaults: int) -> tuple[Setting, ...]:
    """The sizes of families like Llama; ``defaults`` by config.json's names."""
    rows = (
        Setting("block_count", "num_hidden_layers", high=4096),
        Setting("embedding_length", "hidden_size", high=1 << 20),
        Setting("feed_forward_length", "intermediate_size", high=1 << 22),
        Setting("attention.head_count", "num_attention_heads", high=4096),
        Setting("attention.head_count_kv", "num_key_value_heads", 0, high=4096),
        Setting("attention.key_length", "head_dim", 0, high=1 << 14),
        Setting("context_length", "max_position_embeddings", high=1 << 31),
    )
    return tuple(replace(row, default=defaults.get(row.name, row.default)) for row in rows)


_LAYER = "model.layers.{i}"
_NORMS = (
    Rule("output_norm.weight", "model.norm.weight"),
    Rule("blk.{i}.attn_norm.weight", f"{_LAYER}.input_layernorm.weight"),
    Rule("blk.{i}.ffn_norm.weight", f"{_LAYER}.post_attention_layernorm.weight"),
)
_EMBEDDING = Rule("token_embd.weight", "model.embed_tokens.weight")
_FFN = tuple(
    Rule(f"blk.{{i}}.ffn_{kind}.weight", f"{_LAYER}.mlp.{kind}_proj.weight")
    for kind in ("gate", "up", "down")
)
_HEAD_NORMS = (
    Rule("blk.{i}.attn_q_norm.weight", f"{_LAYER}.self_attn.q_norm.weight"),
    Rule("blk.{i}.attn_k_norm.weight", f"{_LAYER}.self_attn.k_norm.weight"),
)


def _attention(change: Change | None = None) -> tuple[Rule, ...]:
    """Query, key, value and output with whatever biases there are; ``change`` of query and key rows."""
    changes = {"q": change, "k": change}
    names = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"}
    return tuple(
        Rule(
            f"blk.{{i}}.{name}.{part}",
            f"{_LAYER}.self_attn.{kind}_proj.{part}",
            changes.get(kind),
            part == "bias",
        )
        for kind, name in names.items()
        for part in ("weight", "bias")
    )


def _one_more(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    return tuple(replace(rule, change=plus_one) for rule in rules)


def _both(name: str, stored: str, *, optional: bool = False) -> tuple[Rule, Rule]:
    """Weight, and bias if there is one."""
    weight = Rule(f"{name}.weight", f"{stored}.weight", optional=optional)
    return weight, replace(weight, name=f"{name}.bias", stored=f"{stored}.bias", optional=True)


_LLAMA = (_EMBEDDING, *_NORMS, *_attention(interleaved), *_FFN)
_QWEN = (_EMBEDDING, *_NORMS, *_attention(), *_FFN)
_GEMMA3_NORMS = (
    Rule("output_norm.weight", "model.norm.weight"),
    Rule("blk.{i}.attn_norm.weight", f"{_LAYER}.input_layernorm.weight"),
    Rule("blk.{i}.post_attention_norm.weight", f"{_LAYER}.post_attention_layernorm.weight"),
    Rule("blk.{i}.ffn_norm.weight", f"{_LAYER}.pre_feedforward_layernorm.weight"),
    Rule("blk.{i}.post_ffw_norm.weight", f"{_LAYER}.post_feedforward_layernorm.weight"),
    *_HEAD_NORMS,
)


def _every_layer(config: Config, index: int) -> bool:
    return True


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
    *_both("output_norm", "model.decoder.final_layer_norm"),
    *_both("blk.{i}.attn_norm", f"{_OPT_LAYER}.self_attn_layer_norm"),
    *_both("blk.{i}.ffn_norm", f"{_OPT_LAYER}.final_layer_norm"),
    *_both("blk.{i}.attn_q", f"{_OPT_LAYER}.self_attn.q_proj"),
    *_both("blk.{i}.attn_k", f"{_OPT_LAYER}.self_attn.k_proj"),
    *_both("blk.{i}.attn_v", f"{_OPT_LAYER}.self_attn.v_proj"),
    *_both("blk.{i}.attn_output", f"{_OPT_LAYER}.self_attn.out_proj"),
    *_both("blk.{i}.ffn_up", f"{_OPT_LAYER}.fc1"),
    *_both("blk.{i}.ffn_down", f"{_OPT_LAYER}.fc2"),
)
_FALCON_LAYER = "transformer.h.{i}"
# The norms are those of 7B (one), 11B (the same name in the newer form) and of 40B and 180B (two).
_FALCON = (
    Rule("token_embd.weight", "transformer.word_embeddings.weight"),
    *_both("output_norm", "transformer.ln_f"),
    *_both("blk.{i}.attn_norm", f"{_FALCON_LAYER}.input_layernorm", optional=True),
    *_both("blk.{i}.attn_norm", f"{_FALCON_LAYER}.ln_mlp", optional=True),
    *_both("blk.{i}.attn_norm_2", f"{_FALCON_LAYER}.ln_attn", optional=True),
    *(
        replace(rule, change=grouped)
        for rule in _both("blk.{i}.attn_qkv", f"{_FALCON_LAYER}.self_attention.query_key_value")
    ),
    *_both("blk.{i}.attn_output", f"{_FALCON_LAYER}.self_attention.dense"),
    *_both("blk.{i}.ffn_up", f"{_FALCON_LAYER}.mlp.dense_h_to_4h"),
    *_both("blk.{i}.ffn_down", f"{_FALCON_LAYER}.mlp.dense_4h_to_h"),
)
_NEMOTRON_NORMS = tuple(
    rule
    for norm in _NORMS
    for rule in (
        replace(norm, change=plus_one),
        replace(
            norm, name=norm.name.replace(".weight", ".bias"), stored=norm.stored.replace(".weight", ".bias")
        ),
    )
)
_NEMOTRON = (
    _EMBEDDING,
    *_NEMOTRON_NORMS,
    *_attention(),
    *_both("blk.{i}.ffn_up", f"{_LAYER}.mlp.up_proj"),
    *_both("blk.{i}.ffn_down", f"{_LAYER}.mlp.down_proj"),
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
    _settings(
        num_hidden_layers=26,
        hidden_size=2304,
        intermediate_size=9216,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        max_position_embeddings=131072,
    ),
    (_EMBEDDING, *_one_more(_GEMMA3_NORMS), *_attention(), *_FFN),
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

_BAMBOO_CHANGES = (("relu", "drelu"),)  # its code applies it to gate and up
_OPT_FAMILY = Family(
    "opt",
    ("OPTForCausalLM",),
    "opt",
    (
        *(
            row
            for row in _settings()
            if row.name in ("num_hidden_layers", "hidden_size", "num_attention_heads")
        ),
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
        *(
            row
            for row in _settings()
            if row.name in ("num_hidden_layers", "hidden_size", "num_attention_heads")
        ),
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
        Family("llama", ("LlamaForCausalLM",), "llama", _settings(), _LLAMA, fixed=(("mlp_bias", False),)),
        # ProSparse: Llama 2 with a class of its own for its activation.
        Family("sparsellama", ("SparseLlamaForCausalLM",), "llama", _settings(), _LLAMA,
               activation="fatrelu"),
        Family("bamboo", ("BambooForCausalLM",), "bamboo", _settings(num_key_value_heads=8), _LLAMA,
               activation="relu", activations=_BAMBOO_CHANGES, sliding=_every_layer),
        Family("mistral", ("MistralForCausalLM",), "llama", _settings(num_key_value_heads=8), _LLAMA,
               window=4096, sliding=_every_layer),
        Family("qwen2", ("Qwen2ForCausalLM",), "qwen2", _settings(num_key_value_heads=32), _QWEN,
               window=4096, sliding=_qwen_layers),
        Family("qwen3", ("Qwen3ForCausalLM",), "qwen3", _settings(num_key_value_heads=32, head_dim=128),
               (*_QWEN, *_HEAD_NORMS), window=4096, sliding=_qwen_layers),
        _GEMMA3,
        _OPT_FAMILY,
        _FALCON_FAMILY,
        Family("nemotron", ("NemotronForCausalLM",), "nemotron", _settings(), _NEMOTRON, activation="relu2",
               norm_name="norm_eps", norm_eps=1e-5, rotary_share=0.5),
    )
}  # fmt: skip

#: Models of text and images: the section of config.json with the text model, and the classes that have it.
_TEXT_SECTIONS = {"gemma3": ("text_config", ("Gemma3ForConditionalGeneration",))}


def find_family(config: Config) -> tuple[Family, Config]:
    """The row for a config.json, and the (part of the) document that describes the text model.

    Raises ModelError for a family or class that is not supported. Code that a directory brings along
    (``auto_map``) is never run: a class of its own is refused.
    """
    kind = config.text("model_type")
    classes: tuple[str, ...]
    if kind in _TEXT_SECTIONS:
        section, classes = _TEXT_SECTIONS[kind]
        config_of_text = config.section(section)
        kind = config_of_text.text("model_type", "gemma3_text")
        family = _row(config, kind)
    else:
        family = _row(config, kind)
        classes, config_of_text = family.classes, config
    named = config.items("architectures")
    if named and named[0] not in classes:
        raise ModelError(
            f"{config.file}: architecture {str(named[0])[:80]!r} is not supported for the model type "
            f"{kind!r} (supported: {', '.join(classes)}); code in the directory is never run"
        )
    return family, config_of_text


def _row(config: Config, kind: str) -> Family:
    if kind not in FAMILIES:
        known = ", ".join(sorted({*FAMILIES, *_TEXT_SECTIONS}))
        raise ModelError(f"{config.file}: model type {kind[:80]!r} is not supported (supported: {known})")
    return FAMILIES[kind]
