"""What mixes tokens without attention: short convolutions, state space models and delta nets, as weights.

What such a layer keeps from token to token is of one size, however long the text is.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

from powerinfer_kernels import RowType
from powerinfer_tools.model.architectures import RecurrentKind
from powerinfer_tools.model.hyperparameter_types import RecurrentSizes
from powerinfer_tools.model.tensors import Norm, Table, Tensors, Vector, Weight


@dataclass(frozen=True)
class ShortConvolution:
    """LFM2: ``inward`` (3 · width, width) makes b, c and x; ``outward`` reads c · convolution(b · x)."""

    inward: Weight
    kernel: Table  # (length, width)
    outward: Weight


@dataclass(frozen=True)
class SelectiveScan:
    """Mamba (arXiv 2312.00752): ``inward`` makes x and z, (2 · inner, width); ``mix`` the low rank of the
    steps, B and C, (rank + 2 · state, inner); ``step`` (inner, rank)."""

    inward: Weight
    kernel: Table  # (length, inner)
    kernel_bias: Vector | None
    mix: Weight
    step: Weight
    step_bias: Vector
    decay: Table  # (state, inner)
    direct: Vector  # (inner,)
    outward: Weight
    step_norm: Norm | None  # (rank,), as Jamba has it
    vector_norm: Norm | None  # of B and C, (2 · state,)


@dataclass(frozen=True)
class StateSpace:
    """Mamba-2 (arXiv 2405.21060): ``inward`` makes z, x, B, C and the steps, (2 · inner + 2 · groups · state
    + heads, width); ``norm`` is over each group."""

    inward: Weight
    kernel: Table  # (length, inner + 2 · groups · state)
    kernel_bias: Vector | None
    step_bias: Vector  # (heads,)
    decay: Vector
    direct: Vector
    norm: Norm | None  # (inner,)
    outward: Weight
    sizes: RecurrentSizes


@dataclass(frozen=True)
class DeltaNet:
    """Gated delta net (arXiv 2412.06464): ``mixed`` makes queries, keys and values, (2 · groups · state +
    inner, width); ``groups`` of the sizes are key heads, each of ``state`` values. ``interleaved``: a key
    head serves neighbouring heads, else head h takes key head h mod groups."""

    mixed: Weight
    gate: Weight  # (inner, width)
    rate: Weight  # (heads, width)
    step: Weight  # (heads, width)
    kernel: Table
    step_bias: Vector
    decay: Vector
    norm: Norm  # (inner / heads,)
    outward: Weight
    sizes: RecurrentSizes
    interleaved: bool


@dataclass(frozen=True)
class ChannelDeltaNet:
    """Kimi delta attention (arXiv 2510.26692): a delta net whose state decays by rows; queries, keys and
    values (inner, width) have a convolution each; decays and the gate (inner, width) are products of two
    matrices of low rank, or of one matrix."""

    projections: tuple[Weight, Weight, Weight]
    kernels: tuple[Table, Table, Table]
    step: tuple[Weight, ...]  # (state, width), (inner, state)
    gate: tuple[Weight, ...]
    rate: Weight  # (heads, width)
    step_bias: Vector  # (inner,)
    decay: Vector  # (inner,): that of each head, for each of its channels
    norm: Norm  # (inner / heads,)
    outward: Weight
    sizes: RecurrentSizes


@dataclass(frozen=True)
class TimeMixing:
    """RWKV-7 (arXiv 2503.14456): each of ``shift`` (2, parts · width) mixes a token's input with the one
    before, for queries, decays, keys, values, rates and, where there is one, the gate. Pairs are matrices of
    low rank, (rank, width) and (width, rank); ``value_gate`` mixes the first layer's values into those of
    others. ``ones`` (heads, width) adds up the values of each head."""

    shift: Table
    query: Weight
    key: Weight
    value: Weight
    decay: tuple[Weight, Weight]
    decay_bias: Vector
    rate: tuple[Weight, Weight]
    rate_bias: Vector
    value_gate: tuple[Weight, Weight] | None
    value_bias: Vector | None
    gate: tuple[Weight, Weight] | None
    unit_scale: Vector  # (width,): of the keys that are removed
    key_scale: Vector
    bonus: Vector
    norm: Norm | None  # (width,), over each head
    ones: Weight
    outward: Weight
    heads: int


@dataclass(frozen=True)
class HeadScan:
    """PLaMo 2: a state space whose B, C and steps come from the convolved values, by ``mix`` (2 · state +
    rank, inner), each normalised; ``inward`` (2 · inner, width) makes each head's gate and values."""

    inward: Weight
    kernel: Table  # (length, inner)
    mix: Weight
    step: Weight  # (heads, rank)
    step_bias: Vector
    step_norm: Norm
    vector_norm: Norm  # of B and C, (2 · state,)
    decay: Vector  # (heads,)
    direct: Vector
    outward: Weight
    sizes: RecurrentSizes


Recurrent = HeadScan | TimeMixing | ChannelDeltaNet | ShortConvolution | SelectiveScan | StateSpace | DeltaNet


def read_recurrent(
    tensors: Tensors, kind: RecurrentKind, sizes: RecurrentSizes, prefix: str, width: int
) -> Recurrent:
    """The weights of a recurrent layer. Raises FormatError and ModelError."""
    match kind:
        case "short convolution":
            return ShortConvolution(
                tensors.matrix(f"{prefix}.shortconv.in_proj.weight", 3 * width, width),
                _kernel(tensors, f"{prefix}.shortconv.conv.weight", width, sizes.length),
                tensors.matrix(f"{prefix}.shortconv.out_proj.weight", width, width),
            )
        case "selective scan":
            return _selective_scan(tensors, sizes, prefix, width)
        case "state space":
            return _state_space(tensors, sizes, prefix, width)
        case "head scan":
            return _head_scan(tensors, sizes, prefix, width)
        case "time mixing":
            return _time_mixing(tensors, sizes, prefix)
        case "channel delta net":
            return _channel_delta_net(tensors, sizes, prefix, width)
        case _:
            return _delta_net(tensors, sizes, prefix, width)


def _kernel(tensors: Tensors, name: str, channels: int, length: int) -> Table:
    return np.ascontiguousarray(tensors.table(name, (channels, length)).T)


def _selective_scan(tensors: Tensors, s: RecurrentSizes, prefix: str, width: int) -> SelectiveScan:
    step_norm = tensors.optional(f"{prefix}.ssm_dt_norm.weight", s.heads)
    vectors = [tensors.optional(f"{prefix}.ssm_{kind}_norm.weight", s.state) for kind in "bc"]
    present = [vector for vector in vectors if vector is not None]
    return SelectiveScan(
        inward=tensors.matrix(f"{prefix}.ssm_in.weight", 2 * s.inner, width),
        kernel=_kernel(tensors, f"{prefix}.ssm_conv1d.weight", s.inner, s.length),
        kernel_bias=tensors.optional(f"{prefix}.ssm_conv1d.bias", s.inner),
        mix=tensors.matrix(f"{prefix}.ssm_x.weight", s.heads + 2 * s.state, s.inner),
        step=tensors.matrix(f"{prefix}.ssm_dt.weight", s.inner, s.heads),
        step_bias=tensors.vector(f"{prefix}.ssm_dt.bias", s.inner),
        decay=np.ascontiguousarray(tensors.table(f"{prefix}.ssm_a", (s.inner, s.state)).T),
        direct=tensors.vector(f"{prefix}.ssm_d", s.inner),
        outward=tensors.matrix(f"{prefix}.ssm_out.weight", width, s.inner),
        step_norm=None if step_norm is None else Norm("rms", step_norm),
        vector_norm=Norm("rms", np.concatenate(present)) if len(present) == 2 else None,
    )


def _state_space(tensors: Tensors, s: RecurrentSizes, prefix: str, width: int) -> StateSpace:
    channels = s.inner + 2 * s.groups * s.state
    norm = f"{prefix}.ssm_norm.weight"
    weight = tensors.values(norm, s.inner) if tensors.has(norm) else None
    return StateSpace(
        inward=tensors.matrix(f"{prefix}.ssm_in.weight", s.inner + channels + s.heads, width),
        kernel=_kernel(tensors, f"{prefix}.ssm_conv1d.weight", channels, s.length),
        kernel_bias=tensors.optional(f"{prefix}.ssm_conv1d.bias", channels),
        step_bias=tensors.vector(f"{prefix}.ssm_dt.bias", s.heads),
        decay=tensors.values(f"{prefix}.ssm_a", s.heads),
        direct=tensors.values(f"{prefix}.ssm_d", s.heads),
        norm=None if weight is None else Norm("rms", weight),
        outward=tensors.matrix(f"{prefix}.ssm_out.weight", width, s.inner),
        sizes=s,
    )


def _delta_net(tensors: Tensors, s: RecurrentSizes, prefix: str, width: int) -> DeltaNet:
    channels = s.inner + 2 * s.groups * s.state
    together = f"{prefix}.ssm_ba.weight"
    if interleaved := tensors.has(together):
        both = tensors.matrix(together, 2 * s.heads, width)
        places = np.arange(2 * s.heads).reshape(s.groups, 2, -1)
        rate, step = (both.rows_at(places[:, part].ravel()) for part in (0, 1))
    else:
        rate = tensors.matrix(f"{prefix}.ssm_beta.weight", s.heads, width)
        step = tensors.matrix(f"{prefix}.ssm_alpha.weight", s.heads, width)
    mixed, gate = _mixed_and_gate(tensors, s, prefix, channels, width)
    return DeltaNet(
        mixed=mixed,
        gate=gate,
        rate=rate,
        step=step,
        kernel=_kernel(tensors, f"{prefix}.ssm_conv1d.weight", channels, s.length),
        step_bias=tensors.vector(f"{prefix}.ssm_dt.bias", s.heads),
        decay=tensors.vector(f"{prefix}.ssm_a", s.heads),
        norm=Norm("rms", tensors.vector(f"{prefix}.ssm_norm.weight", s.inner // s.heads)),
        outward=tensors.matrix(f"{prefix}.ssm_out.weight", width, s.inner),
        sizes=s,
        interleaved=interleaved,
    )


def _channel_delta_net(tensors: Tensors, s: RecurrentSizes, prefix: str, width: int) -> ChannelDeltaNet:
    rank = s.inner // s.heads
    query, key, value = (f"{prefix}.attn_{kind}" for kind in "qkv")
    kernels = (_singled_kernel(tensors, f"{prefix}.ssm_conv1d_{kind}.weight", s) for kind in "qkv")
    decay = tensors.values(f"{prefix}.ssm_a", s.heads)
    for name in (query, key, value):  # no published model has them, and readers of files leave them out
        tensors.leave_out(f"{name}.bias")
    return ChannelDeltaNet(
        projections=(
            tensors.matrix(f"{query}.weight", s.inner, width),
            tensors.matrix(f"{key}.weight", s.inner, width),
            tensors.matrix(f"{value}.weight", s.inner, width),
        ),
        kernels=(next(kernels), next(kernels), next(kernels)),
        step=_factors(tensors, f"{prefix}.ssm_f", s.inner, rank, width),
        gate=_factors(tensors, f"{prefix}.ssm_g", s.inner, rank, width),
        rate=tensors.matrix_or_row(f"{prefix}.ssm_beta.weight", s.heads, width),
        step_bias=tensors.vector(f"{prefix}.ssm_dt.bias", s.inner),
        decay=np.repeat(decay, rank),
        norm=Norm("rms", tensors.vector(f"{prefix}.ssm_norm.weight", rank)),
        outward=tensors.matrix(f"{prefix}.attn_output.weight", width, s.inner),
        sizes=s,
    )


def _factors(tensors: Tensors, name: str, rows: int, rank: int, width: int) -> tuple[Weight, ...]:
    """A matrix (rows, width), or the two of low rank that make it, the one that reads the input first."""
    if not tensors.has(f"{name}_b.weight"):
        return (tensors.matrix(f"{name}_a.weight", rows, width),)
    return (
        tensors.matrix(f"{name}_a.weight", rank, width),
        tensors.matrix(f"{name}_b.weight", rows, rank),
    )


def _head_scan(tensors: Tensors, s: RecurrentSizes, prefix: str, width: int) -> HeadScan:
    rank = tensors.shape(f"{prefix}.ssm_dt.weight")[1]
    vectors = [tensors.vector(f"{prefix}.ssm_{kind}_norm", s.state) for kind in "bc"]
    return HeadScan(
        inward=tensors.matrix(f"{prefix}.ssm_in.weight", 2 * s.inner, width),
        kernel=_kernel(tensors, f"{prefix}.ssm_conv1d.weight", s.inner, s.length),
        mix=tensors.matrix(f"{prefix}.ssm_x.weight", 2 * s.state + rank, s.inner),
        step=tensors.matrix(f"{prefix}.ssm_dt.weight", s.heads, rank),
        step_bias=tensors.vector(f"{prefix}.ssm_dt.bias", s.heads),
        step_norm=Norm("rms", tensors.vector(f"{prefix}.ssm_dt_norm", rank)),
        vector_norm=Norm("rms", np.concatenate(vectors)),
        decay=tensors.values(f"{prefix}.ssm_a", s.heads),
        direct=tensors.values(f"{prefix}.ssm_d", s.heads),
        outward=tensors.matrix(f"{prefix}.ssm_out.weight", width, s.inner),
        sizes=s,
    )


def _time_mixing(tensors: Tensors, s: RecurrentSizes, prefix: str) -> TimeMixing:
    width, name = s.inner, f"{prefix}.time_mix"
    first = prefix == "blk.0"
    gated = tensors.has(f"{name}_g1.weight")
    if first:  # other layers mix its values in
        for part in ("v0", "v1", "v2"):
            tensors.leave_out(f"{name}_{part}.weight")
    parts = 6 if gated else 5
    before = tensors.values(f"{name}_lerp_fused.weight", parts * width)
    normed = tensors.optional(f"{name}_ln.weight", width)
    return TimeMixing(
        shift=np.stack([before, 1 - before]),
        query=tensors.matrix(f"{name}_receptance.weight", width, width),
        key=tensors.matrix(f"{name}_key.weight", width, width),
        value=tensors.matrix(f"{name}_value.weight", width, width),
        decay=_low_rank(tensors, f"{name}_w", width),
        decay_bias=tensors.values(f"{name}_w0.weight", width),
        rate=_low_rank(tensors, f"{name}_a", width),
        rate_bias=tensors.values(f"{name}_a0.weight", width),
        value_gate=None if first else _low_rank(tensors, f"{name}_v", width),
        value_bias=None if first else tensors.values(f"{name}_v0.weight", width),
        gate=_low_rank(tensors, f"{name}_g", width) if gated else None,
        unit_scale=tensors.values(f"{name}_k_k.weight", width),
        key_scale=tensors.values(f"{name}_k_a.weight", width),
        bonus=tensors.values(f"{name}_r_k.weight", width),
        norm=None if normed is None else Norm("layer", normed, tensors.vector(f"{name}_ln.bias", width)),
        ones=_ones_of_heads(s.heads, width),
        outward=tensors.matrix(f"{name}_output.weight", width, width),
        heads=s.heads,
    )


def _low_rank(tensors: Tensors, name: str, width: int) -> tuple[Weight, Weight]:
    rank = tensors.shape(f"{name}1.weight")[0]
    return (
        tensors.matrix(f"{name}1.weight", rank, width),
        tensors.matrix(f"{name}2.weight", width, rank),
    )


@cache
def _ones_of_heads(heads: int, width: int) -> Weight:
    """One for all layers."""
    values = np.repeat(np.eye(heads, dtype=np.float32), width // heads, axis=1)
    return Weight("ones", RowType.F32, heads, width, values.reshape(-1).view(np.uint8))


def _singled_kernel(tensors: Tensors, name: str, s: RecurrentSizes) -> Table:
    """Some files have another number, 1, between channels and length."""
    return np.ascontiguousarray(tensors.values(name, s.inner * s.length).reshape(s.inner, s.length).T)


def _mixed_and_gate(
    tensors: Tensors, s: RecurrentSizes, prefix: str, channels: int, width: int
) -> tuple[Weight, Weight]:
    """In older files the rows of both are one tensor, key head by key head: its query, key, values, gates."""
    together = f"{prefix}.ssm_in.weight"
    if tensors.has(f"{prefix}.attn_qkv.weight"):
        tensors.leave_out(together)
        mixed = tensors.matrix(f"{prefix}.attn_qkv.weight", channels, width)
        return mixed, tensors.matrix(f"{prefix}.attn_gate.weight", s.inner, width)
    both = tensors.matrix(together, channels + s.inner, width)
    ends = np.cumsum([s.state, s.state, s.inner // s.groups])
    places = np.split(np.arange(both.rows).reshape(s.groups, -1), ends, axis=1)
    query, key, value, gate = (part.ravel() for part in places)
    return both.rows_at(np.concatenate([query, key, value])), both.rows_at(gate)
