"""Tensors and keys of synthetic models that mix tokens otherwise than by plain attention: Nemotron-H, RWKV-7,
and latent attention as PLM has it."""

from collections.abc import Iterator
from dataclasses import dataclass

from powerinfer_tools.errors import ModelError

#: Name, and shape: rows and columns of a matrix, or of a table or vector, which stays F32.
Matrix = tuple[str, tuple[int, ...]]


@dataclass(frozen=True)
class Recurrence:
    """Sizes of what mixes tokens: ``pattern`` has a letter for each layer, M a state space, * attention, - an
    FFN, E experts (empty: every layer mixes tokens and has an FFN); ``inner`` width, values of ``state``,
    ``heads`` and ``groups``, ``length`` of the convolution; of RWKV-7 ``ranks`` of decays, rates, values and
    the gate, and ``state`` values of a head."""

    pattern: str = ""
    inner: int = 0
    state: int = 0
    heads: int = 0
    groups: int = 1
    length: int = 4
    ranks: tuple[int, int, int, int] = (0, 0, 0, 0)

    @property
    def channels(self) -> int:
        """What a state space convolves."""
        return self.inner + 2 * self.groups * self.state

    def keys(self, layers: int, neurons: int, kv_heads: int) -> dict[str, int | list[int]]:
        """Metadata below the family's prefix."""
        if not self.pattern:
            names = ("decay", "iclr", "value_residual_mix", "gate")
            keys: dict[str, int | list[int]] = {"wkv.head_size": self.state, "token_shift_count": 2}
            for name, rank in zip(names, self.ranks, strict=True):
                keys[f"attention.{name}_lora_rank"] = rank
            return keys
        if len(self.pattern) != layers:
            raise ModelError(f"a pattern of {len(self.pattern)} letters is none of {layers} layers")
        return {
            "ssm.inner_size": self.inner,
            "ssm.state_size": self.state,
            "ssm.time_step_rank": self.heads,
            "ssm.group_count": self.groups,
            "ssm.conv_kernel": self.length,
            "feed_forward_length": [neurons if letter in "-E" else 0 for letter in self.pattern],
            "attention.head_count_kv": [kv_heads if letter == "*" else 0 for letter in self.pattern],
        }


@dataclass(frozen=True)
class Latent:
    """Sizes of latent attention: the ``rank`` of keys and values, and of each head the widths of its keys'
    two parts, ``plain`` and ``rotary``, and of its ``value``."""

    rank: int
    plain: int
    rotary: int
    value: int

    def keys(self) -> dict[str, int]:
        """Metadata below the family's prefix."""
        return {
            "attention.kv_lora_rank": self.rank,
            "attention.key_length": self.plain + self.rotary,
            "attention.value_length": self.value,
            "rope.dimension_count": self.rotary,
        }

    def matrices(self, heads: int, width: int) -> list[tuple[str, int, int]]:
        """Name, rows and columns of each matrix."""
        return [
            ("attn_q", heads * (self.plain + self.rotary), width),
            ("attn_kv_a_mqa", self.rank + self.rotary, width),
            ("attn_kv_b", heads * (self.plain + self.value), self.rank),
            ("attn_output", width, heads * self.value),
        ]


def state_space(r: Recurrence, width: int) -> tuple[list[Matrix], list[Matrix]]:
    """Matrices, and what stays F32, of a layer of Nemotron-H."""
    matrices: list[Matrix] = [
        ("ssm_in.weight", (r.inner + r.channels + r.heads, width)),
        ("ssm_out.weight", (width, r.inner)),
    ]
    floats: list[Matrix] = [
        ("ssm_conv1d.weight", (r.channels, r.length)),
        ("ssm_conv1d.bias", (r.channels,)),
        ("ssm_dt.bias", (r.heads,)),
        ("ssm_a", (r.heads, 1)),
        ("ssm_d", (r.heads, 1)),
        ("ssm_norm.weight", (r.groups, r.inner // r.groups)),
    ]
    return matrices, floats


def time_mixing(r: Recurrence, width: int) -> tuple[list[Matrix], list[Matrix]]:
    """The same of a layer of RWKV-7."""
    name = "time_mix"
    kinds = ("receptance", "key", "value", "output")
    matrices: list[Matrix] = [(f"{name}_{kind}.weight", (width, width)) for kind in kinds]
    floats: list[Matrix] = [
        (f"{name}_lerp_fused.weight", (6, 1, 1, width)),
        ("channel_mix_lerp_k.weight", (1, 1, width)),
    ]
    for kind, rank in zip("wavg", r.ranks, strict=True):
        floats += [(f"{name}_{kind}1.weight", (rank, width)), (f"{name}_{kind}2.weight", (width, rank))]
    vectors = ("w0", "a0", "v0", "k_k", "k_a", "r_k", "ln")
    floats += [(f"{name}_{kind}.weight", (width,)) for kind in vectors]
    return matrices, [*floats, (f"{name}_ln.bias", (width,))]


def layer_parts(r: Recurrence, layer: int) -> Iterator[str]:
    """What a layer consists of: "state space", "time mixing", "attention", "ffn", "experts"."""
    if not r.pattern:
        yield from ("time mixing", "ffn")
    else:
        yield {"M": "state space", "*": "attention", "-": "ffn", "E": "experts"}[r.pattern[layer]]
