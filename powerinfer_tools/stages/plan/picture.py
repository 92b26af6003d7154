"""The predictions of a plan as a picture: where the time of one token goes, for each way to run the model."""

from pathlib import Path

from powerinfer_formats.plan import Plan
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

    Raises DrawingError for another ending, and where matplotlib is not installed.
    """
    picture = Picture(path, (8, 1.6 + 0.6 * len(plan.predictions)))
    axes = picture.axes
    for row, prediction in enumerate(plan.predictions.values()):
        left = 0.0
        for part, colour in _COLOURS.items():
            width = 1e3 * prediction.seconds.get(part, 0.0)
            axes.barh(row, width, left=left, color=colour, label=part if row == 0 else None)
            left += width
        axes.text(left, row, f" {prediction.tokens_per_second:.1f} tok/s", va="center")
    axes.set_yticks(range(len(plan.predictions)), list(plan.predictions))
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set(xlabel="predicted time of a token (ms)", title=f"{plan.model.name} on {plan.hardware.name}")
    axes.figure.legend(loc="outside lower center", ncols=len(_COLOURS))
    picture.write()
