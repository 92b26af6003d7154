"""Tables of the rotary position encoding."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from powerinfer_tools.model.hyperparameters import Hyperparameters, Rope

Table = npt.NDArray[np.float32]


@dataclass(frozen=True)
class RotaryTables:
    """Cosines and sines of every angle, float32 [capacity, rope_dim / 2]."""

    cos: Table
    sin: Table

    @property
    def nbytes(self) -> int:
        """Size of both tables."""
        return self.cos.nbytes + self.sin.nbytes


def rotary_angles(rope: Rope, capacity: int, factors: Table | None) -> npt.NDArray[np.float64]:
    """Angles [capacity, rope.dim / 2] of positions 0 … capacity-1: p / scale · base^(-2i/dim) / factors[i].

    Source: RoFormer (arXiv 2104.09864) eq. 15; ``scale`` is linear position interpolation (arXiv 2306.15595);
    ``factors`` the per-frequency divisors of ``rope_freqs.weight``.
    """
    exponents = np.arange(0, rope.dim, 2, dtype=np.float64) / rope.dim
    frequencies = rope.base**-exponents / rope.scale
    if factors is not None and rope.factored:
        frequencies = frequencies / factors.astype(np.float64)
    return np.outer(np.arange(capacity, dtype=np.float64), frequencies)


def rotary_tables(rope: Rope, capacity: int, factors: Table | None = None) -> RotaryTables:
    """Cosines and sines of :func:`rotary_angles`."""
    angles = rotary_angles(rope, capacity, factors)
    return RotaryTables(
        np.ascontiguousarray(np.cos(angles), dtype=np.float32),
        np.ascontiguousarray(np.sin(angles), dtype=np.float32),
    )


def rope_tables(hyper: Hyperparameters, capacity: int, factors: Table | None) -> dict[Rope, RotaryTables]:
    """The tables of every kind of rotary positions that a layer has."""
    ropes = {facts.rope: None for facts in hyper.facts if facts.rope is not None}
    return {rope: rotary_tables(rope, capacity, factors) for rope in ropes}
