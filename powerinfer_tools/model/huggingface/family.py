"""What a family of Hugging Face directories is, as data, and the rules that several have in common."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from powerinfer_tools.model.huggingface.changes import Change, plus_one
from powerinfer_tools.model.huggingface.config import Config
from powerinfer_tools.model.huggingface.parts import Part


@dataclass(frozen=True)
class Setting:
    """A whole number of config.json: GGUF ``key`` (below the architecture's prefix) ← ``name``.

    ``default``: what the family assumes where the file says nothing, 0 to leave the key out; None: it has to
    say. ``derive``: the number by other settings, where ``name`` alone does not tell. ``zero``: 0 is a number
    as others are, and written.
    """

    key: str
    name: str
    default: int | None = None
    high: int = 1 << 24
    derive: Callable[[Config], int] | None = None
    zero: bool = False


@dataclass(frozen=True)
class Real:
    """A number of config.json: GGUF ``key`` (below the architecture's prefix) ← ``name``, which may be that
    of a section, a dot and a name there, or ``default``; where that is 0, the key is left out. ``derive``: as
    in :class:`Setting`."""

    key: str
    name: str
    default: float
    derive: Callable[[Config], float] | None = None


@dataclass(frozen=True)
class Rule:
    """GGUF tensor ``name`` ← tensor ``stored``; "{i}" is the layer in both. Where ``stored`` has "{e}", there
    is one for each expert, or further residual stream, and ``name`` is their stack. ``single``: kept in
    float32, whatever it is stored as; ``squeezed``: without dimensions of 1; ``transposed``: columns are
    stored as rows; ``part``: which of the rows. Experts may be stored as MXFP4 blocks and scales instead."""

    name: str
    stored: str
    change: Change | None = None
    optional: bool = False
    single: bool = False
    squeezed: bool = False
    transposed: bool = False
    part: Part | None = None


@dataclass(frozen=True)
class Family:
    """One kind of directory. ``classes``: what ``architectures`` may name; other code would be another model.

    ``spellings``: what the "model." in front of stored names may be instead. ``sliding``: which layers see
    only ``sliding_window`` positions, where ``layer_types`` does not say. ``flags``: truth values, as GGUF
    key, name (or what reads it) and what it is without being named. ``fixed``: settings of which one value is
    supported (null and absent count as it); ``same``: settings that must equal another; ``reasons``: what
    other values of those would mean. ``ignored``: beginnings of tensor names that no text model needs.
    ``rotary_share``: the part of a head that is rotated, where ``rotary_name`` does not say;
    ``natively_paired``: values that are rotated together are stored as GGUF has them; ``rotary_values`` names
    how many values of a head are rotated; ``constants``: GGUF keys that are the same in all models;
    ``further_layers``: there may be layers that predict further tokens, which are left out; ``head_names``:
    what the head may be called beside ``lm_head.weight``; ``rotary_layers``: the list that has a 1 for each
    layer with rotary positions. ``activations``: names that mean something else in this family.
    ``layer_list``: what lists the kinds of layers; ``recurrent``: which layers mix tokens without attention,
    where it does not say; ``window_name``: the setting with the length of windows, or of chunks; ``numbers``:
    GGUF keys with a number for each layer ← tensors of one value; ``lists``: the same ← settings;
    ``real_lists``: the same of numbers that are not whole; ``derived``: endings of tensors that are
    computed from settings everywhere today; ``without_experts``: the family of models without experts,
    decided by ``has_experts``, or a count of 0."""

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
    rotary_layers: str = ""
    activations: tuple[tuple[str, str], ...] = ()
    window: int = 0
    sliding: Callable[[Config, int], bool] | None = None
    flags: tuple[tuple[str, str | Callable[[Config], bool], bool], ...] = ()
    fixed: tuple[tuple[str, object], ...] = ()
    same: tuple[tuple[str, str], ...] = ()
    reasons: tuple[tuple[str, str], ...] = ()
    reals: tuple[Real, ...] = ()
    rotary_name: str = "partial_rotary_factor"
    rotary_values: str = ""
    constants: tuple[tuple[str, int], ...] = ()
    further_layers: bool = False
    natively_paired: bool = False
    head_names: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    layer_list: str = "layer_types"
    recurrent: Callable[[Config, int], bool] | None = None
    window_name: str = "sliding_window"
    numbers: tuple[tuple[str, str], ...] = ()
    lists: tuple[tuple[str, Callable[[Config], list[int]]], ...] = ()
    real_lists: tuple[tuple[str, Callable[[Config], list[float]]], ...] = ()
    derived: tuple[str, ...] = ()
    without_experts: "Family | None" = None
    has_experts: Callable[[Config], bool] | None = None


def sizes(**defaults: int) -> tuple[Setting, ...]:
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


LAYER = "model.layers.{i}"
NORMS = (
    Rule("output_norm.weight", "model.norm.weight"),
    Rule("blk.{i}.attn_norm.weight", f"{LAYER}.input_layernorm.weight"),
    Rule("blk.{i}.ffn_norm.weight", f"{LAYER}.post_attention_layernorm.weight"),
)
EMBEDDING = Rule("token_embd.weight", "model.embed_tokens.weight")
FFN = tuple(
    Rule(f"blk.{{i}}.ffn_{kind}.weight", f"{LAYER}.mlp.{kind}_proj.weight") for kind in ("gate", "up", "down")
)
HEAD_NORMS = (
    Rule("blk.{i}.attn_q_norm.weight", f"{LAYER}.self_attn.q_norm.weight"),
    Rule("blk.{i}.attn_k_norm.weight", f"{LAYER}.self_attn.k_norm.weight"),
)


def attention(change: Change | None = None) -> tuple[Rule, ...]:
    """Query, key, value and output with whatever biases there are; ``change`` of query and key rows."""
    changes = {"q": change, "k": change}
    names = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"}
    return tuple(
        Rule(
            f"blk.{{i}}.{name}.{part}",
            f"{LAYER}.self_attn.{kind}_proj.{part}",
            changes.get(kind),
            part == "bias",
        )
        for kind, name in names.items()
        for part in ("weight", "bias")
    )


def one_more(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """The same for weights that are stored as their difference from one."""
    return tuple(replace(rule, change=plus_one) for rule in rules)


def both(name: str, stored: str, *, optional: bool = False) -> tuple[Rule, Rule]:
    """Weight, and bias if there is one."""
    weight = Rule(f"{name}.weight", f"{stored}.weight", optional=optional)
    return weight, replace(weight, name=f"{name}.bias", stored=f"{stored}.bias", optional=True)


def optional(*rules: Rule) -> tuple[Rule, ...]:
    """The same of tensors that only some layers have."""
    return tuple(replace(rule, optional=True) for rule in rules)


def every_layer(config: Config, index: int) -> bool:
    """All layers are limited to the window."""
    return True
