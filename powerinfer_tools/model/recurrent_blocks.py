"""The recurrent blocks of a model, written once in the vocabulary of
:mod:`powerinfer_tools.model.operations`, as those of :mod:`powerinfer_tools.model.blocks`."""

from typing import TypeVar

from powerinfer_tools.model.operations import Activation, HeadPart, Operations
from powerinfer_tools.model.recurrent import (
    ChannelDeltaNet,
    DeltaNet,
    Recurrent,
    SelectiveScan,
    ShortConvolution,
    StateSpace,
)
from powerinfer_tools.model.tensors import Weight

V = TypeVar("V")
_SILU, _SIGMOID, _SOFTPLUS = Activation("silu"), Activation("sigmoid"), Activation("softplus")


def recurrent(ops: Operations[V, Weight], w: Recurrent, normed: V, eps: float) -> V:
    """What a recurrent layer makes of its normalised input."""
    if isinstance(w, ShortConvolution):
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


def _channel_delta_net(ops: Operations[V, Weight], w: ChannelDeltaNet, normed: V, eps: float) -> V:
    s = w.sizes
    parts = []
    for kind, matrix, kernel in zip("qkv", w.projections, w.kernels, strict=True):
        mixed = ops.linear("mixed", normed, matrix)
        parts.append(ops.convolve(f"convolved_{kind}", mixed, kernel, None, 0, silu=True))
    query, key, value = parts
    gate = ops.linear("mixer_gate", ops.linear("low", normed, w.gate[0]), w.gate[1])
    decay = ops.linear("decays", ops.linear("low_steps", normed, w.step[0]), w.step[1])
    decay = ops.times(ops.activate(ops.plus(decay, w.step_bias), None, _SOFTPLUS), w.decay)
    rate = ops.activate(ops.linear("rates", normed, w.rate), None, _SIGMOID)
    both = ops.gather_heads("unit_keys", 1, (HeadPart(query, 0, 0, s.inner), HeadPart(key, 0, 0, s.inner)))
    both = ops.unit_heads(both, 2 * s.heads, eps)
    out = ops.delta_net("scanned", both, value, decay, rate, s, interleaved=True)
    return ops.activate(gate, ops.norm_heads(out, s.heads, w.norm, eps), _SIGMOID)


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
