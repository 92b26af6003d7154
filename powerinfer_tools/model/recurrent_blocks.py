"""The recurrent blocks of a model, written once in the vocabulary of
:mod:`powerinfer_tools.model.operations`, as those of :mod:`powerinfer_tools.model.blocks`."""

from typing import TypeVar

from powerinfer_tools.model.operations import Activation, HeadPart, Operations
from powerinfer_tools.model.recurrent import (
    ChannelDeltaNet,
    DeltaNet,
    HeadScan,
    Recurrent,
    SelectiveScan,
    ShortConvolution,
    StateSpace,
    TimeMixing,
)
from powerinfer_tools.model.streams import Along
from powerinfer_tools.model.tensors import Vector, Weight

V = TypeVar("V")
#: Decays are at least e^−0.606531, and heads of RWKV-7 are normalised and keys made units with these.
_LEAST_DECAY, _HEAD_EPS, _UNIT_EPS = 0.606531, 64e-5, 1e-24
_SILU, _SIGMOID, _SOFTPLUS = Activation("silu"), Activation("sigmoid"), Activation("softplus")


def recurrent(ops: Operations[V, Weight], w: Recurrent, normed: V, eps: float, along: Along[V]) -> V:
    """What a recurrent layer makes of its normalised input."""
    if isinstance(w, HeadScan):
        out = _head_scan(ops, w, normed, eps)
    elif isinstance(w, TimeMixing):
        out = _time_mixing(ops, w, normed, along)
    elif isinstance(w, ShortConvolution):
        out = _short_convolution(ops, w, normed)
    elif isinstance(w, SelectiveScan):
        out = _selective_scan(ops, w, normed, eps)
    elif isinstance(w, StateSpace):
        out = _state_space(ops, w, normed, eps)
    elif isinstance(w, ChannelDeltaNet):
        out = _channel_delta_net(ops, w, normed, eps)
    else:
        out = _delta_net(ops, w, normed, eps)
    return ops.linear("mixer_out", out, w.outward)


def _short_convolution(ops: Operations[V, Weight], w: ShortConvolution, normed: V) -> V:
    mixed, width = ops.linear("mixed", normed, w.inward), w.kernel.shape[1]
    entering = ops.part("entering", mixed, 0, width)
    entering = ops.times(entering, ops.part("values", mixed, 2 * width, width))
    out = ops.convolve("convolved", entering, w.kernel, None, 0, silu=False)
    return ops.times(out, ops.part("mixer_gate", mixed, width, width))


def _selective_scan(ops: Operations[V, Weight], w: SelectiveScan, normed: V, eps: float) -> V:
    size, inner = w.decay.shape
    mixed = ops.linear("mixed", normed, w.inward)
    x = ops.convolve("convolved", mixed, w.kernel, w.kernel_bias, 0, silu=True)
    low, rank = ops.linear("low", x, w.mix), w.step.columns
    steps, vectors = ops.part("low_steps", low, 0, rank), ops.part("vectors", low, rank, 2 * size)
    if w.step_norm is not None and w.vector_norm is not None:
        steps = ops.norm_heads(steps, 1, w.step_norm, eps)
        vectors = ops.norm_heads(vectors, 2, w.vector_norm, eps)
    steps = ops.activate(ops.linear("steps", steps, w.step, w.step_bias), None, _SOFTPLUS)
    out = ops.scan_channels("scanned", x, steps, vectors, w.decay, w.direct)
    return ops.activate(ops.part("mixer_gate", mixed, inner, inner), out, _SILU)


def _state_space(ops: Operations[V, Weight], w: StateSpace, normed: V, eps: float) -> V:
    s, channels = w.sizes, w.kernel.shape[1]
    mixed = ops.linear("mixed", normed, w.inward)
    steps = ops.plus(ops.part("steps", mixed, s.inner + channels, s.heads), w.step_bias)
    x = ops.convolve("convolved", mixed, w.kernel, w.kernel_bias, s.inner, silu=True)
    steps = ops.activate(steps, None, _SOFTPLUS)
    out = ops.scan_heads("scanned", x, steps, w.decay, w.direct, s)
    out = ops.activate(ops.part("mixer_gate", mixed, 0, s.inner), out, _SILU)
    return out if w.norm is None else ops.norm_heads(out, s.groups, w.norm, eps)


def _head_scan(ops: Operations[V, Weight], w: HeadScan, normed: V, eps: float) -> V:
    s = w.sizes
    dim, rank = s.inner // s.heads, w.step.columns
    mixed = ops.linear("mixed", normed, w.inward)
    entering = ops.gather_heads("entering", s.heads, (HeadPart(mixed, dim, 2 * dim, dim),))
    x = ops.convolve("convolved", entering, w.kernel, None, 0, silu=True)
    low = ops.linear("low", x, w.mix)
    vectors = ops.norm_heads(ops.part("vectors", low, 0, 2 * s.state), 2, w.vector_norm, eps)
    steps = ops.norm_heads(ops.part("low_steps", low, 2 * s.state, rank), 1, w.step_norm, eps)
    steps = ops.activate(ops.linear("steps", steps, w.step, w.step_bias), None, _SOFTPLUS)
    parts = (HeadPart(x, 0, 0, s.inner), HeadPart(vectors, 0, 0, 2 * s.state))
    out = ops.scan_heads("scanned", ops.gather_heads("scan_input", 1, parts), steps, w.decay, w.direct, s)
    gate = ops.gather_heads("mixer_gate", s.heads, (HeadPart(mixed, 0, 2 * dim, dim),))
    return ops.activate(gate, out, _SILU)


def _channel_delta_net(ops: Operations[V, Weight], w: ChannelDeltaNet, normed: V, eps: float) -> V:
    s = w.sizes
    parts = []
    for kind, matrix, kernel in zip("qkv", w.projections, w.kernels, strict=True):
        mixed = ops.linear("mixed", normed, matrix)
        parts.append(ops.convolve(f"convolved_{kind}", mixed, kernel, None, 0, silu=True))
    query, key, value = parts
    gate = _product(ops, ("low", "mixer_gate"), normed, w.gate)
    decay = ops.plus(_product(ops, ("low_steps", "decays"), normed, w.step), w.step_bias)
    if s.bound:
        decay = ops.scale(ops.activate(ops.times(decay, w.decay), None, _SIGMOID), s.bound)
    else:
        decay = ops.times(ops.activate(decay, None, _SOFTPLUS), w.decay)
    rate = ops.activate(ops.linear("rates", normed, w.rate), None, _SIGMOID)
    both = ops.gather_heads("unit_keys", 1, (HeadPart(query, 0, 0, s.inner), HeadPart(key, 0, 0, s.inner)))
    both = ops.unit_heads(both, 2 * s.heads, eps)
    out = ops.delta_net("scanned", both, value, decay, rate, s, interleaved=True)
    return ops.activate(gate, ops.norm_heads(out, s.heads, w.norm, eps), _SIGMOID)


def _product(ops: Operations[V, Weight], names: tuple[str, str], x: V, matrices: tuple[Weight, ...]) -> V:
    """x times one or two matrices."""
    for name, matrix in zip(names[-len(matrices) :], matrices, strict=True):
        x = ops.linear(name, x, matrix)
    return x


def _delta_net(ops: Operations[V, Weight], w: DeltaNet, normed: V, eps: float) -> V:
    s, keys = w.sizes, 2 * w.sizes.groups * w.sizes.state
    mixed = ops.linear("mixed", normed, w.mixed)
    gate = ops.linear("mixer_gate", normed, w.gate)
    rate, decay = ops.linear("rates", normed, w.rate), ops.linear("decays", normed, w.step)
    x = ops.convolve("convolved", mixed, w.kernel, None, 0, silu=True)
    rate = ops.activate(rate, None, _SIGMOID)
    decay = ops.times(ops.activate(ops.plus(decay, w.step_bias), None, _SOFTPLUS), w.decay)
    both = ops.unit_heads(ops.part("unit_keys", x, 0, keys), 2 * s.groups, eps)
    out = ops.delta_net("scanned", both, x, decay, rate, s, interleaved=w.interleaved)
    return ops.activate(gate, ops.norm_heads(out, s.heads, w.norm, eps), _SILU)


def _time_mixing(ops: Operations[V, Weight], w: TimeMixing, normed: V, along: Along[V]) -> V:
    width, parts = w.outward.columns, w.shift.shape[1] // w.outward.columns
    mixed = ops.gather_heads("mixed", parts, (HeadPart(normed, 0, 0, width),))
    mixed = ops.convolve("convolved", mixed, w.shift, None, 0, silu=False)

    def part(index: int) -> V:
        return ops.part("entering", mixed, index * width, width)

    def low(index: int, matrices: tuple[Weight, Weight], bias: Vector | None) -> V:
        return ops.linear("gates", ops.linear("low", part(index), matrices[0]), matrices[1], bias)

    query = ops.linear("query", part(0), w.query)
    decay = ops.softcap(ops.linear("low", part(1), w.decay[0]), 1.0)  # tanh
    decay = ops.activate(ops.linear("decays", decay, w.decay[1], w.decay_bias), None, _SIGMOID)
    decay = ops.scale(decay, -_LEAST_DECAY)
    key = ops.linear("key", part(2), w.key)
    value = ops.linear("value", part(3), w.value)
    if along.first_value is None or w.value_gate is None:
        along.first_value = ops.copy("first_value", value)
    else:
        share = ops.activate(low(3, w.value_gate, w.value_bias), None, _SIGMOID)
        change = ops.join(ops.copy("change", along.first_value), value, -1.0)
        value = ops.join(value, ops.times(change, share))
    rate = ops.linear("rates", ops.linear("low", part(4), w.rate[0]), w.rate[1], w.rate_bias)
    rate = ops.activate(rate, None, _SIGMOID)
    unit = ops.times(ops.copy("unit_keys", key), w.unit_scale)
    unit = ops.unit_heads(unit, w.heads, _UNIT_EPS)
    scaled = ops.times(ops.copy("values", key), w.key_scale)
    change = ops.join(ops.times(ops.copy("change", rate), scaled), scaled, -1.0)
    key = ops.join(key, change)
    out = ops.general_delta("scanned", query, key, value, decay, unit, rate, w.heads)
    if w.norm is not None:
        out = ops.norm_heads(out, w.heads, w.norm, _HEAD_EPS)
    bonus = ops.times(ops.times(ops.copy("change", key), query), w.bonus)
    bonus = ops.linear("bonus", bonus, w.ones)
    out = ops.join(out, ops.times(ops.copy("values", value), bonus, width // w.heads))
    if w.gate is None:
        return out
    gate = ops.activate(ops.linear("low", part(5), w.gate[0]), None, _SIGMOID)
    return ops.times(out, ops.linear("mixer_gate", gate, w.gate[1]))
