"""Choosing one candidate for each layer: fewest bytes a token, within a limit on the sum of their prices."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Candidate:
    """What may be chosen for a layer: ``price`` counts against the limit, ``touched`` are the bytes that one
    token touches, ``what`` is the caller's."""

    price: float
    touched: float
    what: Any = None


def choose(layers: Sequence[Sequence[Candidate]], limit: float) -> list[Candidate]:
    """One candidate of each layer: fewest bytes touched, prices within ``limit``.

    Greedy along each layer's lower convex hull, largest saving per price first: the optimum of the relaxed
    problem. Each layer has at least its cheapest candidate, which the limit does not forbid.
    """
    hulls = [_hull(candidates) for candidates in layers]
    chosen = [0] * len(hulls)
    spent = sum(hull[0].price for hull in hulls)
    steps: list[tuple[float, int]] = []

    def offer(layer: int) -> None:
        hull, at = hulls[layer], chosen[layer]
        if at + 1 < len(hull):
            heapq.heappush(steps, (-_saving(hull[at], hull[at + 1]), layer))

    for layer in range(len(hulls)):
        offer(layer)
    while steps:
        _, layer = heapq.heappop(steps)
        hull, at = hulls[layer], chosen[layer]
        more = hull[at + 1].price - hull[at].price
        if spent + more > limit:
            continue
        spent += more
        chosen[layer] += 1
        offer(layer)
    return [hull[at] for hull, at in zip(hulls, chosen, strict=True)]


def _hull(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates in which each further unit of price saves less than the one before, and saves at all."""
    hull: list[Candidate] = []
    for new in sorted(candidates, key=lambda candidate: (candidate.price, candidate.touched)):
        if hull and new.touched >= hull[-1].touched:
            continue
        while len(hull) >= 2 and _saving(hull[-2], hull[-1]) <= _saving(hull[-1], new):
            hull.pop()
        hull.append(new)
    return hull


def _saving(cheap: Candidate, dear: Candidate) -> float:
    return (cheap.touched - dear.touched) / (dear.price - cheap.price)
