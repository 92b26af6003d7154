"""Tables of the rotary position encoding."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from powerinfer_tools.model.hyperparameters import Hyperparameters

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


def rotary_tables(
    capacity: int, rope_dim: int, base: float, scale: float = 1.0, factors: Table | None = None
) -> RotaryTables:
    """Tables for positions 0 … capacity-1: angle(p, i) = p / scale · base^(-2i/rope_dim) / factors[i].

    Source: RoFormer (arXiv 2104.09864) eq. 15; ``scale`` is linear position interpolation (arXiv 2306.15595);
    ``factors`` the per-frequency divisors of ``rope_freqs.weight``. Angles are computed in float64.
    """
    exponents = np.arange(0, rope_dim, 2, dtype=np.float64) / rope_dim
    frequencies = base**-exponents / scale
    if factors is not None:
        frequencies = frequencies / factors.astype(np.float64)
    angles = np.outer(np.arange(capacity, dtype=np.float64), frequencies)
    return RotaryTables(
        np.ascontiguousarray(np.cos(angles), dtype=np.float32),
        np.ascontiguousarray(np.sin(angles), dtype=np.float32),
    )


def layer_tables(hyper: Hyperparameters, capacity: int, factors: Table | None) -> tuple[RotaryTables, ...]:
    """The tables of each layer: layers of one kind share theirs."""
    wide = rotary_tables(capacity, hyper.rope_dim, hyper.rope_base, hyper.rope_scale, factors)
    if not any(hyper.local_layers):
        return (wide,) * hyper.layers
    local = rotary_tables(capacity, hyper.rope_dim, hyper.rope_local_base)
    return tuple(local if is_local else wide for is_local in hyper.local_layers)
