"""The course of a relufy run as a picture."""

from pathlib import Path

from powerinfer_tools.pictures import Picture
from powerinfer_tools.stages.relufy.options import RelufyReport

_PERPLEXITY, _ZEROS = "#0969da", "#bf8700"


def draw_history(report: RelufyReport, path: Path, title: str) -> None:
    """Write the picture to ``path`` (.png or .svg): perplexity over the dense model's and the share of zeros,
    on the held-out windows, against the tokens learned from.

    Raises DrawingError for another ending, and where matplotlib is not installed.
    """
    picture = Picture(path, (7, 5))
    axes, beside = picture.axes, picture.axes.twinx()
    tokens = [reading.tokens for reading in report.history]
    ratios = [reading.perplexity / report.dense_perplexity for reading in report.history]
    zeros = [100 * (1 - reading.density) for reading in report.history]
    axes.plot(tokens, ratios, color=_PERPLEXITY, marker=".", label="perplexity")
    beside.plot(tokens, zeros, color=_ZEROS, marker=".", label="zeros")
    axes.set(title=title, xlabel="tokens of distillation")
    axes.set_ylabel("perplexity over that of the dense model", color=_PERPLEXITY)
    beside.set_ylabel("zeros (%)", color=_ZEROS)
    axes.set_ylim(bottom=1.0)
    beside.set_ylim(0, 100)
    axes.grid(color="#d0d7de", linewidth=0.4)
    picture.write()
