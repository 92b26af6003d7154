"""Tables of the rotary position encoding."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from powerinfer_tools.model.hyperparameter_types import Hyperparameters, PositionScale, Rope, Yarn

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


@dataclass(frozen=True)
class RopeFactors:
    """Divisors of the angles that a model may have, float32 (rope_dim / 2): for every context, or one table
    for contexts longer than those of its training and one for others."""

    every: Table | None = None
    long: Table | None = None
    short: Table | None = None

    def of(self, rope: Rope, capacity: int) -> Table | None:
        """The factors for up to ``capacity`` positions."""
        if not rope.factored or self.every is not None:
            return self.every if rope.factored else None
        return self.long if capacity > rope.original else self.short


def position_factors(how: PositionScale, capacity: int) -> npt.NDArray[np.float64]:
    """How queries of positions 0 … capacity-1 grow, [capacity]."""
    steps = (np.arange(capacity) + how.offset) // how.length
    factors: npt.NDArray[np.float64] = 1.0 + how.scale * np.log(steps + 1.0)
    return factors


def rotary_angles(rope: Rope, capacity: int, factors: RopeFactors) -> npt.NDArray[np.float64]:
    """Angles [capacity, rope.dim / 2] of positions 0 … capacity-1: p / scale · base^(-2i/dim) / factors[i].

    Source: RoFormer (arXiv 2104.09864) eq. 15; ``scale`` is linear position interpolation (arXiv 2306.15595);
    ``factors`` the per-frequency divisors of ``rope_freqs.weight``, or of LongRoPE (arXiv 2402.13753).
    """
    exponents = np.arange(0, rope.dim, 2, dtype=np.float64) / rope.dim
    plain, divisors = rope.base**-exponents, factors.of(rope, capacity)
    if divisors is not None:
        plain = plain / divisors[: len(plain)].astype(np.float64)
    kept = 0.0 if rope.yarn is None else _unscaled_shares(rope, rope.yarn)
    frequencies = plain / rope.scale * (1.0 - kept) + plain * kept
    return np.outer(np.arange(capacity, dtype=np.float64), frequencies)


def _unscaled_shares(rope: Rope, yarn: Yarn) -> npt.NDArray[np.float64]:
    """How much of each frequency YaRN keeps: 1 for the first pairs, 0 for the last."""

    def pair(turns: float) -> float:
        return rope.dim * math.log(yarn.original / (turns * 2 * math.pi)) / (2 * math.log(rope.base))

    first, last = max(0, math.floor(pair(yarn.fast))), min(rope.dim - 1, math.ceil(pair(yarn.slow)))
    ramp = (np.arange(rope.dim // 2) - first) / max(0.001, last - first)
    return 1.0 - np.clip(ramp, 0.0, 1.0)


def rotary_tables(rope: Rope, capacity: int, factors: RopeFactors) -> RotaryTables:
    """Cosines and sines of :func:`rotary_angles`, times the magnitude."""
    angles = rotary_angles(rope, capacity, factors)
    return RotaryTables(
        np.ascontiguousarray(rope.magnitude * np.cos(angles), dtype=np.float32),
        np.ascontiguousarray(rope.magnitude * np.sin(angles), dtype=np.float32),
    )


def growth_tables(hyper: Hyperparameters, capacity: int) -> dict[PositionScale, Table]:
    """How queries grow with their position, in each way that a layer has, float32 [capacity]."""
    ways = {facts.position_scale: None for facts in hyper.facts if facts.position_scale is not None}
    return {how: position_factors(how, capacity).astype(np.float32) for how in ways}


def rope_tables(hyper: Hyperparameters, capacity: int, factors: RopeFactors) -> dict[Rope, RotaryTables]:
    """The tables of every kind of rotary positions that a layer has."""
    ropes = {facts.rope: None for facts in hyper.facts if facts.rope is not None}
    return {rope: rotary_tables(rope, capacity, factors) for rope in ropes}
