"""Every operation in float64 numpy, as plainly as possible: the reference for all kernels.

Arrays are [tokens, width] unless said otherwise. Nothing here is fast, and nothing here rounds.
"""

import math

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
#: Neurons whose down rows are summed into one partial sum.
CHUNK = 512
#: Largest magnitude in the code of a sign predictor's input, and its value in root mean squares.
SIGN_LARGEST, SIGN_RANGE = 15, 3


def rms_norm(x: Array, weight: Array | None, eps: float, groups: int = 1) -> Array:
    """x / sqrt(mean(x²) + eps) · weight over each of `groups` equal parts of a row (arXiv 1910.07467). The
    weight is [width / groups], or [width] where every part has its own."""
    parts = x.reshape(len(x), groups, -1)
    out = parts / np.sqrt(np.mean(parts * parts, axis=-1, keepdims=True) + eps)
    return _affine(out, weight, None).reshape(x.shape)


def layer_norm(x: Array, weight: Array | None, bias: Array | None, eps: float, groups: int = 1) -> Array:
    """(x − mean) / sqrt(variance + eps) · weight + bias over each of `groups` equal parts of a row (arXiv
    1607.06450); weight and bias as in `rms_norm`."""
    parts = x.reshape(len(x), groups, -1)
    centred = parts - parts.mean(axis=-1, keepdims=True)
    out = centred / np.sqrt(np.mean(centred * centred, axis=-1, keepdims=True) + eps)
    return _affine(out, weight, bias).reshape(x.shape)


def _affine(parts: Array, weight: Array | None, bias: Array | None) -> Array:
    """parts [T, groups, n] · weight + bias, each [n] or [groups · n]."""
    shape = parts.shape[1:]
    if weight is not None:
        parts = parts * (weight if weight.shape == shape[1:] else weight.reshape(shape))
    if bias is not None:
        parts = parts + (bias if bias.shape == shape[1:] else bias.reshape(shape))
    return parts


def l2_norm(x: Array, eps: float, groups: int = 1) -> Array:
    """x / sqrt(Σ x² + eps) over each of `groups` equal parts of a row."""
    parts = x.reshape(len(x), groups, -1)
    out: Array = parts / np.sqrt(np.sum(parts * parts, axis=-1, keepdims=True) + eps)
    return out.reshape(x.shape)


def keep_top(x: Array, deviations: float) -> Array:
    """max(x − mean − deviations · standard deviation, 0) over each row: the gate of Gemma 3n."""
    cut = x.mean(axis=-1, keepdims=True) + deviations * x.std(axis=-1, keepdims=True)
    out: Array = np.maximum(x - cut, 0)
    return out


def combine(x: Array, coefficients: Array, width: int) -> Array:
    """Linear combinations of vectors of `width` values that lie side by side, a of them in a row: out_b = Σ_a
    coefficients[b, a] · x_a; coefficients [T, made · a]."""
    parts = x.reshape(len(x), -1, width)
    out: Array = coefficients.reshape(len(x), -1, parts.shape[1]) @ parts
    return out.reshape(len(x), -1)


def softcap(x: Array, cap: float) -> Array:
    """cap · tanh(x / cap)"""
    return cap * np.tanh(x / cap)


def xielu(x: Array, positive: float, negative: float, beta: float, eps: float) -> Array:
    """positive · x² + beta · x where x > 0, else negative · (e^min(x, eps) − 1 − x) + beta · x (arXiv
    2411.13010)."""
    below = negative * (np.expm1(np.minimum(x, eps)) - x)
    return np.where(x > 0, positive * x * x, below) + beta * x


def alibi_slopes(heads: int, max_bias: float) -> Array:
    """m_h of arXiv 2108.12409: 2^(−max_bias / n)^(h + 1) for the first n heads, n the largest power of two up
    to `heads`; then every second power of 2^(−max_bias / 2n), beginning with the first. [heads]"""
    n = 1 << (heads.bit_length() - 1)
    first = [2.0 ** (-max_bias / n * (h + 1)) for h in range(n)]
    rest = [2.0 ** (-max_bias / (2 * n) * (2 * h + 1)) for h in range(heads - n)]
    return np.array(first + rest)


def quantize_activations(x: Array) -> tuple[Array, Array]:
    """8-bit values and scales of blocks of 32: d = max|x| / 127, q = round(x / d). (q [T, C], d [T, C / 32])

    The kernels keep d to eleven significant bits.
    """
    blocks = x.reshape(len(x), -1, 32)
    d = np.abs(blocks).max(axis=-1) / 127
    safe = np.where(d > 0, d, 1.0)[..., None]
    return np.rint(blocks / safe).reshape(x.shape), d


def quantized_cache(x: Array) -> Array:
    """The values of x [..., C] after storage in a q8_0 KV cache: round(x / d) · float16(d), d = max|x| / 127
    of blocks of 32."""
    blocks = x.reshape(*x.shape[:-1], -1, 32)
    d = np.abs(blocks).max(axis=-1, keepdims=True) / 127
    codes = np.rint(blocks / np.where(d > 0, d, 1.0))
    kept: Array = codes * d.astype(np.float16).astype(np.float64)
    return kept.reshape(x.shape)


def rope(x: Array, cos: Array, sin: Array, heads: int, position: int, style: str, offset: int = 0) -> Array:
    """Rotate pairs of each head by the angles of its position (arXiv 2104.09864 eq. 34); cos, sin
    [capacity, half].

    Style "norm" pairs (2i, 2i + 1), "neox" (i, i + half), counted from `offset` on; other values stay.
    """
    half = cos.shape[1]
    first = (np.arange(half) * 2 if style == "norm" else np.arange(half)) + offset
    second = first + (1 if style == "norm" else half)
    out = x.reshape(len(x), heads, -1).copy()
    a, b = out[..., first], out[..., second]
    c, s = (table[position : position + len(x), None, :] for table in (cos, sin))
    out[..., first], out[..., second] = a * c - b * s, a * s + b * c
    return out.reshape(x.shape)


def attention(
    q: Array,
    keys: Array,
    values: Array,
    scale: float,
    position: int,
    window: int = 0,
    softcap: float = 0.0,
    chunk: int = 0,
    sinks: Array | None = None,
    slopes: Array | None = None,
) -> Array:
    """Causal softmax(scale · q kᵀ) v, one key head for several query heads (arXiv 1706.03762, 2305.13245).

    q [T, heads, dim]; keys [positions, kv_heads, dim]; values [positions, kv_heads, value_dim]; token t
    is at `position` + t and sees the last `window` positions (0: all) up to its own, and with `chunk` > 0
    no position before the last multiple of `chunk`. softcap c > 0: scores become c · tanh(score / c).
    `slopes` [heads] times the distance of a key is subtracted from its score (ALiBi, arXiv 2108.12409).
    `sinks` [heads]: scores that belong to no key, in the softmax's denominator alone (arXiv 2309.17453). [T,
    heads, value_dim]
    """
    group = q.shape[1] // keys.shape[1]
    out = np.zeros((*q.shape[:2], values.shape[2]))
    for token, head in np.ndindex(q.shape[:2]):
        last = position + token + 1
        first = max(last - window if window else 0, (last - 1) // chunk * chunk if chunk else 0, 0)
        visible = slice(first, last)
        scores = keys[visible, head // group] @ q[token, head] * scale
        if softcap:
            scores = softcap * np.tanh(scores / softcap)
        if slopes is not None:
            scores = scores - slopes[head] * (last - 1 - np.arange(first, last))
        sink = -np.inf if sinks is None else sinks[head]
        top = max(scores.max(), sink)
        weights = np.exp(scores - top)
        out[token, head] = weights / (weights.sum() + np.exp(sink - top)) @ values[visible, head // group]
    return out


def act(gate: Array, kind: str, cut: float = 0.0) -> Array:
    """The activation function alone. silu: x / (1 + e^-x); gelu_tanh: x (1 + tanh(√(2/π) (x + 0.044715
    x³))) / 2; gelu_erf: x (1 + erf(x / √2)) / 2 (arXiv 1606.08415); relu, drelu: max(x, 0); relu2: max(x,
    0)²; fatrelu: x where it is above `cut`, else 0 (arXiv 2402.13516); sigmoid: 1 / (1 + e^-x); softplus:
    log(1 + e^x); swiglu_oai: g / (1 + e^(-1.702 g)) with g = min(x, cut) (gpt-oss); swiglu_clamped:
    silu(min(x, cut)); clamped_silu: min(silu(x), cut)."""
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
            case "sigmoid":
                return np.asarray(1 / (1 + np.exp(-gate)))
            case "softplus":
                return np.logaddexp(0.0, gate)
            case "swiglu_oai":
                clamped = np.minimum(gate, cut)
                return np.asarray(clamped / (1 + np.exp(-1.702 * clamped)))
            case "swiglu_clamped":
                return act(np.minimum(gate, cut), "silu")
            case "clamped_silu":
                return np.minimum(act(gate, "silu"), cut)
            case _:
                raise ValueError(f"no activation is called {kind!r}")
    return gate * share


def activate(gate: Array, up: Array | None, kind: str, cut: float = 0.0) -> Array:
    """act(gate) · up; without `up`, act(gate). drelu: relu(gate) · relu(up) (arXiv 2406.05955); swiglu_oai:
    act(gate) · (u + 1), u = up within ± cut; swiglu_clamped, clamped_silu: act(gate) · u."""
    if up is None:
        return act(gate, kind, cut)
    factor: Array = up
    if kind == "drelu":
        factor = np.maximum(up, 0)
    if kind == "swiglu_oai":
        factor = np.clip(up, -cut, cut) + 1
    if kind in ("swiglu_clamped", "clamped_silu"):
        factor = np.clip(up, -cut, cut)
    return act(gate, kind, cut) * factor


def sum_rows(h: Array, rows: Array) -> Array:
    """Σ_i h_i row_i, [T, columns], in chunks of 512 rows: the order of the kernels."""
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
    """FFN over only the neurons with a gate above `cut`: the others contribute exactly nothing. Without `up`
    rows, the FFN has two matrices, and `gate` is the product of the first."""
    hidden = np.where(gate > cut, activate(gate, None if up is None else x @ up.T, kind, cut), 0.0)
    return sum_rows(hidden, down)
