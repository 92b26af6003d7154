"""Recurrent blocks in float64, token by token: the reference for the kernels. Arrays are [tokens, width]
unless stated otherwise; each function returns the outputs and the state after the last token."""

import numpy as np

from .reference import Array


def convolve(x: Array, weight: Array, bias: Array | None, state: Array) -> tuple[Array, Array]:
    """out_t = bias + Σ_j weight_j · x_{t − length + 1 + j}, weight [length, width], state [length − 1,
    width]: the inputs before the first."""
    rows = np.concatenate([state, x])
    length = len(weight)
    out = np.stack([(weight * rows[t : t + length]).sum(axis=0) for t in range(len(x))])
    return (out if bias is None else out + bias), rows[len(x) :]


def scan_channels(
    x: Array, step: Array, decay: Array, b: Array, c: Array, direct: Array, state: Array
) -> tuple[Array, Array]:
    """Selective scan (arXiv 2312.00752): S = e^(step · decay) S + step · x · b, out = c · S + direct · x; x,
    step [T, width], decay [size, width], b, c [T, size], state S [size, width]."""
    out = np.zeros_like(x)
    for t in range(len(x)):
        state = np.exp(step[t] * decay) * state + b[t][:, None] * (step[t] * x[t])
        out[t] = c[t] @ state + direct * x[t]
    return out, state


def scan_heads(
    x: Array, step: Array, decay: Array, b: Array, c: Array, direct: Array, state: Array
) -> tuple[Array, Array]:
    """Mamba-2 (arXiv 2405.21060): x [T, heads, dim]; step [T, heads]; decay, direct [heads]; b, c [T, groups,
    size], a group for neighbouring heads; state [heads, size, dim]."""
    out, state = np.zeros_like(x), state.copy()
    shared = x.shape[1] // b.shape[1]
    for t, h in np.ndindex(x.shape[:2]):
        decayed = np.exp(step[t, h] * decay[h]) * state[h]
        state[h] = decayed + np.outer(b[t, h // shared], step[t, h] * x[t, h])
        out[t, h] = c[t, h // shared] @ state[h] + direct[h] * x[t, h]
    return out, state


def delta_net(
    q: Array, k: Array, v: Array, decay: Array, rate: Array, scale: float, state: Array
) -> tuple[Array, Array]:
    """Gated delta rule (arXiv 2412.06464): S = e^decay S; S += k (rate · (v − Sᵀk))ᵀ; out = scale · Sᵀq; q, k
    [T, heads, size], v [T, heads, dim], decay, rate [T, heads], state [heads, size, dim]. A decay [T, heads,
    size] has a factor for each row of S (arXiv 2510.26692)."""
    out, state = np.zeros_like(v), state.copy()
    for t, h in np.ndindex(v.shape[:2]):
        s = np.exp(decay[t, h]).reshape(-1, 1) * state[h]
        state[h] = s + np.outer(k[t, h], rate[t, h] * (v[t, h] - k[t, h] @ s))
        out[t, h] = scale * (q[t, h] @ state[h])
    return out, state


def general_delta(
    q: Array, k: Array, v: Array, decay: Array, unit: Array, rate: Array, state: Array
) -> tuple[Array, Array]:
    """Generalised delta rule (RWKV-7, arXiv 2503.14456): S = diag(e^decay) S − (unit · rate) (Sᵀ unit)ᵀ + k
    vᵀ, out = Sᵀq; v [T, heads, dim], the others [T, heads, size], state [heads, size, dim]."""
    out, state = np.zeros_like(v), state.copy()
    for t, h in np.ndindex(v.shape[:2]):
        removed = np.outer(unit[t, h] * rate[t, h], unit[t, h] @ state[h])
        state[h] = np.exp(decay[t, h])[:, None] * state[h] - removed + np.outer(k[t, h], v[t, h])
        out[t, h] = q[t, h] @ state[h]
    return out, state
