"""Every operation once more in float64 numpy, as plainly as possible: what all kernels are compared with.

Arrays are [tokens, width] unless said otherwise. Nothing here is fast, and nothing here rounds.
"""

import math

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
#: Neurons whose down rows are summed into one partial sum.
CHUNK = 512
#: Largest magnitude in the code of a sign predictor's input, and the root mean squares that it stands for.
SIGN_LARGEST, SIGN_RANGE = 15, 3


def rms_norm(x: Array, weight: Array | None, eps: float, groups: int = 1) -> Array:
    """x / sqrt(mean(x²) + eps) · weight over each of `groups` equal parts of a row (arXiv 1910.07467)."""
    parts = x.reshape(len(x), groups, -1)
    out = parts / np.sqrt(np.mean(parts * parts, axis=-1, keepdims=True) + eps)
    scaled: Array = out if weight is None else out * weight
    return scaled.reshape(x.shape)


def layer_norm(x: Array, weight: Array, bias: Array | None, eps: float) -> Array:
    """(x − mean) / sqrt(variance + eps) · weight + bias over each row (arXiv 1607.06450)."""
    centred = x - x.mean(axis=-1, keepdims=True)
    out = centred / np.sqrt(np.mean(centred * centred, axis=-1, keepdims=True) + eps) * weight
    shifted: Array = out if bias is None else out + bias
    return shifted


def quantize_activations(x: Array) -> tuple[Array, Array]:
    """8-bit values and scales of blocks of 32: d = max|x| / 127, q = round(x / d). (q [T, C], d [T, C / 32])

    The kernels keep d to eleven significant bits.
    """
    blocks = x.reshape(len(x), -1, 32)
    d = np.abs(blocks).max(axis=-1) / 127
    safe = np.where(d > 0, d, 1.0)[..., None]
    return np.rint(blocks / safe).reshape(x.shape), d


def quantized_cache(x: Array) -> Array:
    """What a q8_0 KV cache keeps of x [..., C]: round(x / d) · float16(d), d = max|x| / 127 of blocks of
    32."""
    blocks = x.reshape(*x.shape[:-1], -1, 32)
    d = np.abs(blocks).max(axis=-1, keepdims=True) / 127
    codes = np.rint(blocks / np.where(d > 0, d, 1.0))
    kept: Array = codes * d.astype(np.float16).astype(np.float64)
    return kept.reshape(x.shape)


def rope(x: Array, cos: Array, sin: Array, heads: int, position: int, style: str) -> Array:
    """Rotate pairs of each head by the angles of its position (arXiv 2104.09864 eq. 34); cos, sin
    [capacity, half].

    Style "norm" pairs (2i, 2i + 1), "neox" (i, i + half); values past 2 · half stay.
    """
    half = cos.shape[1]
    first = np.arange(half) * 2 if style == "norm" else np.arange(half)
    second = first + (1 if style == "norm" else half)
    out = x.reshape(len(x), heads, -1).copy()
    a, b = out[..., first], out[..., second]
    c, s = (table[position : position + len(x), None, :] for table in (cos, sin))
    out[..., first], out[..., second] = a * c - b * s, a * s + b * c
    return out.reshape(x.shape)


def attention(
    q: Array, keys: Array, values: Array, scale: float, position: int, window: int = 0, softcap: float = 0.0
) -> Array:
    """Causal softmax(scale · q kᵀ) v, one key head for several query heads (arXiv 1706.03762, 2305.13245).

    q [T, heads, dim]; keys and values [positions, kv_heads, dim]; token t stands at `position` + t and sees
    the last `window` positions (0: all) up to its own. softcap c > 0: scores become c · tanh(score / c).
    [T, heads, dim]
    """
    group = q.shape[1] // keys.shape[1]
    out = np.zeros_like(q)
    for token, head in np.ndindex(q.shape[:2]):
        last = position + token + 1
        seen = slice(max(0, last - window) if window else 0, last)
        scores = keys[seen, head // group] @ q[token, head] * scale
        if softcap:
            scores = softcap * np.tanh(scores / softcap)
        weights = np.exp(scores - scores.max())
        out[token, head] = weights / weights.sum() @ values[seen, head // group]
    return out


def act(gate: Array, kind: str, cut: float = 0.0) -> Array:
    """The activation function alone. silu: x / (1 + e^-x); gelu_tanh: x (1 + tanh(√(2/π) (x + 0.044715
    x³))) / 2; gelu_erf: x (1 + erf(x / √2)) / 2 (arXiv 1606.08415); relu, drelu: max(x, 0); relu2: max(x,
    0)²; fatrelu: x where it is above `cut`, else 0 (arXiv 2402.13516)."""
    positive: Array = np.maximum(gate, 0)
    share: Array
    with np.errstate(over="ignore"):
        match kind:
            case "silu":
                share = 1 / (1 + np.exp(-gate))
            case "gelu_tanh":
                share = 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
            case "gelu_erf":
                share = 0.5 * np.vectorize(math.erfc, otypes=[np.float64])(-gate / math.sqrt(2))
            case "relu" | "drelu":
                return positive
            case "relu2":
                return positive * positive
            case "fatrelu":
                return np.where(gate > cut, gate, 0.0)
            case _:
                raise ValueError(f"no activation is called {kind!r}")
    return gate * share


def activate(gate: Array, up: Array | None, kind: str, cut: float = 0.0) -> Array:
    """act(gate) · up; without `up`, act(gate). drelu: relu(gate) · relu(up) (arXiv 2406.05955)."""
    if up is None:
        return act(gate, kind, cut)
    factor: Array = np.maximum(up, 0) if kind == "drelu" else up
    return act(gate, kind, cut) * factor


def sum_rows(h: Array, rows: Array) -> Array:
    """Σ_i h_i row_i, [T, columns], in chunks of 512 rows: the order that the kernels keep."""
    out = np.zeros((len(h), rows.shape[1]))
    for first in range(0, len(rows), CHUNK):
        out += h[:, first : first + CHUNK] @ rows[first : first + CHUNK]
    return out


def keep_large(value: Array, threshold: Array, out: Array) -> Array:
    """`out` with zeros where |value| is not above `threshold` [width]."""
    return np.where(np.abs(value) > threshold, out, 0.0)


def thresholded_ffn(
    known: Array, factor: str, threshold: Array, x: Array, rest: Array, down: Array, kind: str
) -> Array:
    """FFN over the neurons whose `known` factor, act(gate) or up, is larger than `threshold`; `rest` are the
    rows of the other factor."""
    other = x @ rest.T
    hidden = known * other if factor == "gate" else activate(other, known, kind)
    return sum_rows(keep_large(known, threshold, hidden), down)


def sign_code(x: Array) -> tuple[Array, Array]:
    """(q, step) of the input of sign predictors: x ≈ step · q per row, with step = 3 / 15 of the root mean
    square and q = x / step rounded half to even and cut to ±15."""
    step = np.sqrt(np.mean(x * x, axis=-1, keepdims=True)) * (SIGN_RANGE / SIGN_LARGEST)
    return np.clip(np.rint(x / np.where(step > 0, step, 1)), -SIGN_LARGEST, SIGN_LARGEST), step


def sign_scores(x: Array, signs: Array) -> Array:
    """step · Σ_j s_ij · q_j for `signs` [rows, columns] of ±1: which products are positive, without training
    (after SparseInfer, arXiv 2411.12692, which has the signs of the input alone)."""
    q, step = sign_code(x)
    scores: Array = step * (q @ signs.T)
    return scores


def sparse_ffn(gate: Array, x: Array, up: Array | None, down: Array, kind: str, cut: float = 0.0) -> Array:
    """FFN over the neurons with a gate above `cut` alone: the others contribute exactly nothing. Without `up`
    rows, `gate` is the first of two matrices' product."""
    hidden = np.where(gate > cut, activate(gate, None if up is None else x @ up.T, kind, cut), 0.0)
    return sum_rows(hidden, down)
