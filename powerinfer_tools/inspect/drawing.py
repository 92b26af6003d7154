"""The curves of a profile as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from powerinfer_tools.inspect.curve import SHARES, Curves, Inside
from powerinfer_tools.pictures import Picture


def draw_curves(curves: Curves, path: Path, title: str) -> None:
    """Write the picture to ``path`` (.png or .svg): the model's curve on top of its layers' curves and,
    if the neurons inside experts were counted, the share that is active in each layer below.

    Raises DrawingError for another ending, and if matplotlib is not installed.
    """
    picture = Picture(path, (7, 9), panels=2) if curves.inside else Picture(path, (7, 5))
    axes = picture.axes
    shares = [100 * share for share in SHARES]
    for index, layer in enumerate(curves.layers):
        label = "layers" if index == 0 else None
        axes.plot(
            shares, [100 * value for value in layer.points()], color="#8c959f", linewidth=0.6, label=label
        )
    axes.plot(
        shares, [100 * value for value in curves.model.points()], color="#0969da", linewidth=2, label="model"
    )
    axes.plot([0, 100], [0, 100], color="#57606a", linewidth=0.8, linestyle=":", label="all neurons alike")
    axes.set(xlim=(0, 100), ylim=(0, 101), title=title)
    axes.set(xlabel="share of neurons, busiest first (%)", ylabel="share of activity (%)")
    axes.legend(loc="lower right")
    if curves.inside:
        _draw_inside(curves.inside, picture.more)
    picture.write()


def _draw_inside(layers: Sequence[Inside], axes: Any) -> None:
    """A bar for the mean of each layer, and a line from its least to its most active expert."""
    places = [layer.layer for layer in layers]
    means = [100 * layer.mean for layer in layers]
    below = [100 * (layer.mean - min(layer.mean, float(layer.shares.min()))) for layer in layers]
    above = [100 * (max(layer.mean, float(layer.shares.max())) - layer.mean) for layer in layers]
    axes.bar(places, means, color="#0969da", label="mean of the experts taken")
    axes.errorbar(
        places, means, yerr=(below, above), fmt="none", ecolor="#8c959f", label="least to most active expert"
    )
    axes.set(ylim=(0, 100), xlabel="layer", ylabel="active neurons of an expert when taken (%)")
    axes.legend(loc="upper right")
