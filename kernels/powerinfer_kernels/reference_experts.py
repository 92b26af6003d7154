"""Routers, experts and matrices of single heads in float64, as plainly as possible: the reference for the
kernels. Arrays are [tokens, width] unless stated otherwise."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .reference import Array, activate

#: The smallest sum that normalised weights are divided by.
SMALLEST_SUM = 2.0**-14


def route(
    scores: Array,
    used: int,
    *,
    kind: str = "softmax",
    bias: Array | None = None,
    groups: int = 1,
    groups_used: int = 1,
    normalized: bool = False,
    scale: float = 1.0,
) -> tuple[npt.NDArray[np.int64], Array]:
    """(experts, ascending, and weights, both [T, used]) by `scores` [T, experts].

    p = softmax(scores) or sigmoid(scores). The experts with the largest p + bias (ties: the lower number) are
    chosen, among the groups whose two largest values of p + bias have the largest sums (arXiv 2412.19437
    section 2.1.2). Weights are scale · p; if `normalized`, p is first divided by the sum over the chosen
    experts, at least 2^-14.
    """
    if kind == "softmax":
        p = np.exp(scores - scores.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
    else:
        p = 1 / (1 + np.exp(-scores))
    key = scores if bias is None else p + bias
    if groups > 1:
        parts = key.reshape(len(key), groups, -1)
        sums = np.sort(parts, axis=2)[:, :, -2:].sum(axis=2)
        best_groups = np.argsort(-sums, axis=1, kind="stable")[:, :groups_used]
        allowed = np.zeros(sums.shape, bool)
        np.put_along_axis(allowed, best_groups, True, axis=1)
        key = np.where(allowed[:, :, None], parts, -np.inf).reshape(key.shape)
    chosen = np.sort(np.argsort(-key, axis=1, kind="stable")[:, :used], axis=1)
    weights = np.take_along_axis(p, chosen, axis=1)
    if normalized:
        total = weights.sum(axis=1, keepdims=True)
        plain = kind == "softmax" and bias is None and groups == 1  # the softmax over the chosen
        weights = weights / (total if plain else np.maximum(total, SMALLEST_SUM))
    return chosen, weights * scale


def experts(
    x: Array,
    chosen: npt.NDArray[np.int64],
    weights: Array,
    gate: Sequence[Array],
    up: Sequence[Array] | None,
    down: Sequence[Array],
    kind: str,
    *,
    cut: float = 0.0,
    biases: tuple[Array | None, Array | None, Array | None] = (None, None, None),
    weigh_input: bool = False,
) -> Array:
    """Σ over each token's experts of weight · (down · (act(gate · x) · (up · x))), matrices [rows, columns]
    by expert, biases [experts, rows] added to each product; `weigh_input`: weight · x in place of x (Llama
    4)."""
    out = np.zeros((len(x), down[0].shape[0]))
    for token, k in np.ndindex(chosen.shape):
        e, weight = int(chosen[token, k]), weights[token, k]
        row = x[token] * weight if weigh_input else x[token]
        product = [
            None if m is None else m[e] @ row + (0 if b is None else b[e])
            for m, b in zip((gate, up), biases[:2], strict=True)
        ]
        assert product[0] is not None
        hidden = activate(product[0], product[1], kind, cut)
        result = down[e] @ hidden + (0 if biases[2] is None else biases[2][e])
        out[token] += result if weigh_input else weight * result
    return out


def head_matmul(x: Array, matrices: Sequence[Array]) -> Array:
    """matrix_h · x_h for each head's part x_h of a row, side by side."""
    parts = np.split(x, len(matrices), axis=1)
    return np.concatenate([part @ m.T for part, m in zip(parts, matrices, strict=True)], axis=1)
