"""The predictions of a plan as a picture: where the time of one token goes, for each way to run the model."""

from pathlib import Path
from typing import Any

from powerinfer_formats.plan import Plan, PlanPrediction
from powerinfer_tools import detect
from powerinfer_tools.pictures import Picture

_COLOURS = {
    "attention": "#0969da",
    "predictor": "#8250df",
    "hot": "#cf222e",
    "cold": "#54aeff",
    "sync": "#57606a",
    "head": "#bf8700",
}


def draw_predictions(plan: Plan, path: Path) -> None:
    """Write the picture to ``path`` (.png or .svg): a bar for each of the plan's predictions, in milliseconds
    a token by part, with its tokens per second.

    What works at the same time is drawn as two halves of one bar: the hot side above, the cold side below.
    Raises DrawingError for another ending, and where matplotlib is not installed.
    """
    picture = Picture(path, (8, 1.6 + 0.6 * len(plan.predictions)))
    axes = picture.axes
    for row, (name, prediction) in enumerate(plan.predictions.items()):
        hot, cold = _sides(plan) if name == "powerinfer" else (0.0, 0.0)
        left = _draw_parts(axes, row, prediction, hot, cold)
        axes.text(left, row, f" {prediction.tokens_per_second:.1f} tok/s", va="center")
    axes.set_yticks(range(len(plan.predictions)), list(plan.predictions))
    axes.invert_yaxis()
    axes.margins(x=0.15)
    where = (
        plan.hardware.name if plan.hardware.cpu == detect.cpu_name() else f"{plan.hardware.name}, not here"
    )
    axes.set(xlabel="predicted time of a token (ms)", title=f"{plan.model.name}: predicted for {where}")
    handles, labels = axes.get_legend_handles_labels()
    axes.figure.legend(handles, labels, loc="outside lower center", ncols=len(_COLOURS))
    picture.write()


def _sides(plan: Plan) -> tuple[float, float]:
    """Milliseconds of all hot and of all cold FFN parts of the plan, where both sides have some."""
    hot = 1e3 * sum(layer.seconds.hot for layer in plan.layers)
    cold = 1e3 * sum(layer.seconds.cold for layer in plan.layers)
    return (hot, cold) if hot and cold else (0.0, 0.0)


def _draw_parts(axes: Any, row: int, prediction: PlanPrediction, hot: float, cold: float) -> float:
    """Draw one bar and return where it ends. The time in which both sides work, as long as the slower side of
    each layer, is drawn as ``hot`` above ``cold``."""
    left = 0.0
    for part, colour in _COLOURS.items():
        width = 1e3 * prediction.seconds.get(part, 0.0)
        label = part if row == 0 else None
        if part == "hot" and hot:
            axes.barh(row - 0.2, hot, height=0.4, left=left, color=colour, label=label)
            axes.barh(row + 0.2, cold, height=0.4, left=left, color=_COLOURS["cold"], label="cold")
            left += width + 1e3 * prediction.seconds.get("cold", 0.0)
        elif not (part == "cold" and hot):
            axes.barh(row, width, left=left, color=colour, label=label)
            left += width
    return left
