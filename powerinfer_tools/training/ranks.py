"""How large each layer's predictor is to be."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Candidate:
    """A rank, the bytes of its predictor, and the bytes of FFN rows that it would have a token read."""

    rank: int
    nbytes: int
    read: float

    @property
    def touched(self) -> float:
        """Bytes that one token touches."""
        return self.nbytes + self.read


def choose(layers: Sequence[Sequence[Candidate]], budget: int) -> list[Candidate]:
    """One candidate of each layer (sorted by rank): fewest bytes a token, predictors within ``budget``.

    Greedy along each layer's lower convex hull, largest saving per byte of predictor first: the optimum of
    the relaxed problem. Each layer has at least its first candidate, which the budget does not forbid.
    """
    hulls = [_hull(candidates) for candidates in layers]
    chosen = [0] * len(hulls)
    spent = sum(hull[0].nbytes for hull in hulls)
    steps: list[tuple[float, int]] = []

    def offer(layer: int) -> None:
        hull, at = hulls[layer], chosen[layer]
        if at + 1 < len(hull):
            saved = hull[at].touched - hull[at + 1].touched
            heapq.heappush(steps, (-saved / (hull[at + 1].nbytes - hull[at].nbytes), layer))

    for layer in range(len(hulls)):
        offer(layer)
    while steps:
        _, layer = heapq.heappop(steps)
        hull, at = hulls[layer], chosen[layer]
        more = hull[at + 1].nbytes - hull[at].nbytes
        if spent + more > budget:
            continue
        spent += more
        chosen[layer] += 1
        offer(layer)
    return [hull[at] for hull, at in zip(hulls, chosen, strict=True)]


def _hull(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates in which each further byte saves less than the one before, and saves at all."""
    hull: list[Candidate] = []
    for new in candidates:
        if hull and new.touched >= hull[-1].touched:
            continue
        while len(hull) >= 2 and _saving(hull[-2], hull[-1]) <= _saving(hull[-1], new):
            hull.pop()
        hull.append(new)
    return hull


def _saving(small: Candidate, large: Candidate) -> float:
    return (small.touched - large.touched) / (large.nbytes - small.nbytes)
