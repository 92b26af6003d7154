"""The curves of a profile as a picture; with matplotlib, which is an extra."""

from pathlib import Path

from powerinfer_formats.atomic import write_atomic
from powerinfer_tools.errors import PowerInferError
from powerinfer_tools.inspection.curve import SHARES, Curves

FORMATS = (".png", ".svg")


class DrawingError(PowerInferError):
    """The picture cannot be drawn."""


def draw_curves(curves: Curves, path: Path, title: str) -> None:
    """Write the picture to ``path`` (.png or .svg): the model's curve over those of its layers.

    Raises DrawingError for another ending, and where matplotlib is not installed.
    """
    kind = path.suffix.lower()
    if kind not in FORMATS:
        raise DrawingError(
            f"{path}: a chart is written as {' or '.join(FORMATS)}, not {kind or 'without ending'}"
        )
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError:
        raise DrawingError(
            'charts need matplotlib; install it with: pip install "powerinfer[chart]"'
        ) from None
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.add_subplot()
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
    canvas = FigureCanvasSVG(figure) if kind == ".svg" else FigureCanvasAgg(figure)
    with write_atomic(path) as stream:
        canvas.print_figure(stream, format=kind[1:])
