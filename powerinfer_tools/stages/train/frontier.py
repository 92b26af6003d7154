"""The frontier of predictors: how many neurons must be named for how many of the active ones to be found."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from powerinfer_formats.predictors import Quality
from powerinfer_tools.pictures import Picture
from powerinfer_tools.stages.train.layer_data import LayerData
from powerinfer_tools.stages.train.naming import Fit, level_for, quality

#: Shares of active neurons to be found, for the points of a frontier.
RECALLS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.925, 0.95, 0.97, 0.98, 0.99, 0.995, 0.998, 0.999)
_LAYER, _MODEL, _WISH = "#8c959f", "#0969da", "#cf222e"


@dataclass(frozen=True)
class Frontier:
    """What the predictors of ``layers`` reach at each of :data:`RECALLS`: thresholds that find so many of the
    active neurons of the records to choose by, judged on those to test on."""

    layers: tuple[tuple[Quality, ...], ...]

    def model(self) -> list[dict[str, float]]:
        """Of all layers together, point by point: the share of active neurons that are found, and how many
        are named for each active one."""
        points = zip(*self.layers, strict=True)
        return [
            {
                "recall": float(np.mean([each.recall for each in point])),
                "named_over_active": _named(point),
            }
            for point in points
        ]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        layers = [
            [{"recall": each.recall, "named_over_active": _named((each,))} for each in layer]
            for layer in self.layers
        ]
        return {"model": self.model(), "layers": layers}


def frontier_of(made: Fit, data: LayerData) -> tuple[Quality, ...]:
    """The points of one layer."""
    check, test = data.check, data.test
    chosen, judged = made.normal(check.inputs), made.normal(test.inputs)
    return tuple(quality(judged > level_for(chosen, check.active, recall), test.active) for recall in RECALLS)


def draw_frontier(frontier: Frontier, path: Path, title: str, wish: float | None = None) -> None:
    """Write the picture to ``path`` (.png or .svg): the model's frontier over those of its layers, and a line
    at the recall that was asked for, ``wish``.

    Raises DrawingError for another ending, and where matplotlib is not installed.
    """
    picture = Picture(path, (7, 5))
    axes = picture.axes
    for index, layer in enumerate(frontier.as_dict()["layers"]):
        axes.plot(*_line(layer), color=_LAYER, linewidth=0.6, label=None if index else "layers")
    axes.plot(*_line(frontier.model()), color=_MODEL, linewidth=2, marker=".", label="model")
    if wish is not None:
        axes.axhline(100 * wish, color=_WISH, linewidth=0.8, linestyle=":", label="asked for")
    axes.set(xscale="log", xlim=(0.5, 10), ylim=(50, 100.5), title=title)
    ticks = (0.5, 1, 1.5, 2, 3, 4, 6, 10)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set(xlabel="neurons named for each active one", ylabel="active neurons that are found (%)")
    axes.grid(color="#d0d7de", linewidth=0.4)
    axes.legend(loc="lower right")
    picture.write()


def _named(qualities: tuple[Quality, ...]) -> float:
    named = sum(each.predicted_density for each in qualities)
    return named / max(sum(each.density for each in qualities), 1e-12)


def _line(points: list[dict[str, float]]) -> tuple[list[float], list[float]]:
    return [point["named_over_active"] for point in points], [100 * point["recall"] for point in points]
