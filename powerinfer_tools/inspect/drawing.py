"""The curves of a profile as a picture."""

from pathlib import Path

from powerinfer_tools.inspect.curve import SHARES, Curves
from powerinfer_tools.pictures import Picture


def draw_curves(curves: Curves, path: Path, title: str) -> None:
    """Write the picture to ``path`` (.png or .svg): the model's curve on top of its layers' curves.

    Raises DrawingError for another ending, and if matplotlib is not installed.
    """
    picture = Picture(path, (7, 5))
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
    picture.write()
