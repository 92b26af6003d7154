"""The share of each layer's neurons that was computed, and where, from the counters that every program
keeps."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from powerinfer_tools.engine.hot import HotSide
from powerinfer_tools.model.loading import Model

#: First and last operation of a part of a program, its name, and its layer.
Parts = Iterable[tuple[int, int, str, int | None]]


@dataclass(frozen=True)
class LayerShare:
    """The FFN of one layer. Its ``units`` are neurons or experts; ``hot`` of them are on the hot device.

    ``density`` is the mean share of the units that are computed for a token. ``hot_share`` is the part of
    that share that the hot device computed. Both are None before the first token; ``hot_share`` is also None
    where hot and cold experts take turns, which is not counted.
    """

    mode: str
    units: int
    hot: int
    density: float | None
    hot_share: float | None


def layer_shares(
    model: Model,
    modes: Sequence[str],
    hot: HotSide | None,
    parts: Parts,
    counted: npt.NDArray[np.int64],
    tokens: int,
) -> list[LayerShare]:
    """The shares of every layer, over ``tokens``. ``counted`` int64 (operations, 3) are a program's counters
    of its ``parts``, see :meth:`powerinfer_kernels.Program.neurons`."""
    passed = dict.fromkeys(range(model.hyper.layers), 0)
    for first, last, _, layer in parts:
        if layer is not None:
            active, _, looked_at = counted[first:last].sum(axis=0).tolist()
            passed[layer] += looked_at - active
    return [_share(model, layer, modes[layer], hot, passed[layer], tokens) for layer in passed]


def _share(
    model: Model, layer: int, mode: str, hot: HotSide | None, passed_over: int, tokens: int
) -> LayerShare:
    facts, routing = model.hyper.facts[layer], model.hyper.routing
    if facts.ffn == "none":
        return LayerShare("none", 0, 0, None, None)
    if facts.ffn == "experts":
        assert routing is not None
        hot_count = len(hot.hot_experts(layer)) if hot else 0
        density = routing.share if tokens else None
        return LayerShare(
            mode, routing.experts, hot_count, density, 0.0 if tokens and not hot_count else None
        )
    neurons = facts.neurons
    hot_count = hot.hot_neurons(layer) if hot else 0
    if not tokens:
        return LayerShare(mode, neurons, hot_count, None, None)
    predicted = hot.predicted(layer) if hot and hot_count else None
    computed_there = tokens * hot_count - (predicted[0] if predicted else 0)
    computed = computed_there + tokens * (neurons - hot_count) - passed_over
    density, hot_share = computed / (tokens * neurons), computed_there / computed if computed else 0.0
    return LayerShare(mode, neurons, hot_count, density, hot_share)
