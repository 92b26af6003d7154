"""Pictures as PNG or SVG files; with matplotlib, which is an extra."""

from pathlib import Path
from typing import Any

from powerinfer_formats.atomic import write_atomic
from powerinfer_tools.errors import PowerInferError

FORMATS = (".png", ".svg")


class DrawingError(PowerInferError):
    """The picture cannot be drawn."""


class Picture:
    """An empty figure for ``path``; draw on ``axes``, then :meth:`write`.

    Raises DrawingError for an ending other than .png and .svg, and where matplotlib is not installed.
    """

    def __init__(self, path: Path, size: tuple[float, float]) -> None:
        self._path, self._kind = path, path.suffix.lower()
        if self._kind not in FORMATS:
            raise DrawingError(
                f"{path}: a chart is written as {' or '.join(FORMATS)}, not {self._kind or 'without ending'}"
            )
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise DrawingError(
                'charts need matplotlib; install it with: pip install "powerinfer[chart]"'
            ) from None
        self._figure = Figure(figsize=size, layout="constrained")
        self.axes: Any = self._figure.add_subplot()

    def write(self) -> None:
        """Write the file, whole or not at all."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.backends.backend_svg import FigureCanvasSVG

        canvas = FigureCanvasSVG(self._figure) if self._kind == ".svg" else FigureCanvasAgg(self._figure)
        with write_atomic(self._path) as stream:
            canvas.print_figure(stream, format=self._kind[1:])
