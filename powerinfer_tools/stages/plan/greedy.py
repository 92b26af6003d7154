"""The simple placements that people use, computed beside the solver's so that anyone sees what it earned.

Every function returns one level index per unit: units are layers, possibly followed by the head, which the
simple placements leave on the CPU. In a layer's table the exact level of g hot groups and nothing else on the
accelerator has index g; whether a predictor is used is chosen afterwards, by time.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from powerinfer_tools.stages.plan.hull import relax
from powerinfer_tools.stages.plan.levels import LevelTable
from powerinfer_tools.stages.plan.problem import Problem

Integers = npt.NDArray[np.int64]
Choice = tuple[int, ...]


def nothing_hot(tables: Sequence[LevelTable]) -> Choice:
    """Everything on the CPU."""
    return (0,) * len(tables)


def top_k(tables: Sequence[LevelTable], vram_capacity: int, start: Choice | None = None) -> Choice:
    """The busiest neuron groups per byte of the whole model, until the VRAM is full.

    ``start`` holds layers that are placed already; they keep their level. Ties go to the first layer.
    """
    placed = start or nothing_hot(tables)
    room = vram_capacity - sum(int(table.vram[k]) for table, k in zip(tables, placed, strict=True))
    owners, gains, sizes = [], [], []
    for index, table in enumerate(tables):
        groups = table.counts
        if placed[index] or groups < 2:
            continue
        nbytes = np.diff(table.vram[:groups])
        gain = np.diff(table.activations[:groups]) / nbytes
        gains.append(np.minimum.accumulate(gain))
        sizes.append(nbytes)
        owners.append(np.full(groups - 1, index))
    if not owners:
        return placed
    order = np.argsort(-np.concatenate(gains), kind="stable")
    taken = order[: int(np.searchsorted(np.cumsum(np.concatenate(sizes)[order]), room, side="right"))]
    counts = np.bincount(np.concatenate(owners)[taken], minlength=len(tables))
    return tuple(int(count) or k for count, k in zip(counts, placed, strict=True))


def whole_layers(tables: Sequence[LevelTable], vram_capacity: int) -> Choice:
    """The first layers with all that may be placed of them, as long as another whole layer fits; the rest on
    the CPU. This is how layer-wise offload works."""
    choice, used = [], 0
    for table in tables:
        last = int(np.argmax(table.hot + table.block_hot))
        fits = table.total_activations > 0 and used + int(table.vram[last]) <= vram_capacity
        choice.append(last if fits else 0)
        used += int(table.vram[choice[-1]])
    return tuple(choice)


def whole_layers_then_top_k(tables: Sequence[LevelTable], vram_capacity: int) -> Choice:
    """Whole layers first, then the busiest groups of the others in what is left."""
    return top_k(tables, vram_capacity, start=whole_layers(tables, vram_capacity))


def attention_hot(tables: Sequence[LevelTable], vram_capacity: int) -> Choice:
    """Attention of the first layers, as long as it fits, and every FFN on the CPU."""
    choice, used = [], 0
    for table in tables:
        cold = np.flatnonzero((table.block_hot == 1) & (table.hot == 0) & (table.disk == 0))
        first = int(cold[0]) if len(cold) and table.total_activations > 0 else 0
        fits = used + int(table.vram[first]) <= vram_capacity
        choice.append(first if fits else 0)
        used += int(table.vram[choice[-1]])
    return tuple(choice)


def greedy_choices(tables: Sequence[LevelTable], problem: Problem) -> dict[str, Choice]:
    """All simple placements by name. Some may break the RAM budget; ask ``problem.fits``."""
    capacity = problem.vram_capacity
    simple = {
        "cpu only": nothing_hot(tables),
        "top-k": top_k(tables, capacity),
        "whole layers": whole_layers(tables, capacity),
        "FFNs on the CPU": attention_hot(tables, capacity),
        "whole layers, then top-k": whole_layers_then_top_k(tables, capacity),
    }
    choices = {}
    for name, choice in simple.items():
        quick = fastest_alike(tables, choice)
        choices[name] = quick if problem.fits(quick) else choice
    relaxed = relax(problem)
    if relaxed is not None:
        choices["rounded relaxation"] = relaxed.choice
    return choices


def fastest_alike(tables: Sequence[LevelTable], choice: Choice) -> Choice:
    """The same placement of neurons and blocks, with every layer computed in the fastest way."""
    return tuple(table.fastest_like(k) for table, k in zip(tables, choice, strict=True))
