"""Looking into files: their contents, and the activation curve of a profile."""

from powerinfer_tools.inspect.chart import terminal_chart
from powerinfer_tools.inspect.curve import Curves, activation_curves, summarize_profile
from powerinfer_tools.inspect.describe import Description, TensorRow, describe
from powerinfer_tools.inspect.drawing import draw_curves

__all__ = [
    "Curves",
    "Description",
    "TensorRow",
    "activation_curves",
    "describe",
    "draw_curves",
    "summarize_profile",
    "terminal_chart",
]
