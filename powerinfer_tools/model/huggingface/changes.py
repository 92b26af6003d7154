"""How a stored tensor becomes the one that GGUF has: each change takes and gives rows (axis 0)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class HeadShape:
    """Attention of a model: numbers of heads and values in one; of delta nets the key heads, values in one of
    those, and value heads."""

    heads: int
    kv_heads: int
    head_dim: int
    delta_groups: int = 1
    delta_state: int = 0
    delta_heads: int = 1


#: Raises ValueError, saying why, for rows that it cannot be applied to.
Change = Callable[[Array, HeadShape], Array]


def interleaved(rows: Array, shape: HeadShape) -> Array:
    """Value i of a head and value i + head_dim/2, which are rotated together, as neighbours.

    GGUF's llama family pairs neighbours, Hugging Face's pairs halves of a head.
    """
    if len(rows) % shape.head_dim:
        raise ValueError(f"{len(rows)} rows are no whole number of heads of {shape.head_dim}")
    halves = rows.reshape(-1, 2, shape.head_dim // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


def grouped(rows: Array, shape: HeadShape) -> Array:
    """Each key head with its queries and values (Falcon's rows) as all queries, all keys, all values."""
    if len(rows) != (shape.heads + 2 * shape.kv_heads) * shape.head_dim or shape.heads % shape.kv_heads:
        raise ValueError(f"{len(rows)} rows do not hold {shape.heads} heads and {shape.kv_heads} key heads")
    groups = rows.reshape(shape.kv_heads, -1, shape.head_dim, *rows.shape[1:])
    parts = (groups[:, :-2], groups[:, -2], groups[:, -1])
    return np.concatenate([part.reshape(-1, *rows.shape[1:]) for part in parts])


def plus_one(values: Array, shape: HeadShape) -> Array:
    """Norm weights that are stored as their difference from one (Gemma)."""
    return values + np.float32(1)


def minus_exp(values: Array, shape: HeadShape) -> Array:
    """Decays that are stored as the logarithm of what they are below zero."""
    return np.asarray(-np.exp(values))


def tiled(rows: Array, shape: HeadShape) -> Array:
    """Value heads of a delta net: those of each key head one after the other, as the first of all key heads,
    the second of all, and so on."""
    if len(rows) % shape.delta_heads or shape.delta_heads % shape.delta_groups:
        raise ValueError(
            f"{len(rows)} rows do not hold {shape.delta_heads} heads in {shape.delta_groups} groups"
        )
    heads = rows.reshape(shape.delta_groups, shape.delta_heads // shape.delta_groups, -1)
    return np.ascontiguousarray(heads.swapaxes(0, 1)).reshape(rows.shape)


def tiled_values(rows: Array, shape: HeadShape) -> Array:
    """The same of the rows after those of queries and keys."""
    first = 2 * shape.delta_groups * shape.delta_state
    return np.concatenate([rows[:first], tiled(rows[first:], shape)])


def tiled_columns(rows: Array, shape: HeadShape) -> Array:
    """The same of columns."""
    return np.ascontiguousarray(tiled(np.ascontiguousarray(rows.T), shape).T)


def tiled_decays(values: Array, shape: HeadShape) -> Array:
    """Decays, head by head."""
    return tiled(minus_exp(values, shape), shape)
