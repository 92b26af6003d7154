"""Pictures as PNG or SVG files, drawn with the optional package matplotlib."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from powerinfer_formats.atomic import write_atomic
from powerinfer_tools.errors import PowerInferError, how_to_install

FORMATS = (".png", ".svg")


class DrawingError(PowerInferError):
    """The picture cannot be drawn."""


def require_drawable(path: Path) -> None:
    """Raises DrawingError for an ending other than .png and .svg, for a missing folder, and if matplotlib is
    not installed. Call this before long work whose result is to be drawn."""
    kind = path.suffix.lower()
    if kind not in FORMATS:
        raise DrawingError(
            f"{path}: a chart is written as {' or '.join(FORMATS)}, not {kind or 'without ending'}"
        )
    if not path.parent.is_dir():
        raise DrawingError(f"{path}: there is no folder {path.parent} to write the chart to; make it first")
    if find_spec("matplotlib") is None:
        raise DrawingError(f"charts need matplotlib; {how_to_install('matplotlib')}")


class Picture:
    """An empty figure for ``path``; draw on ``axes``, then :meth:`write`. With two ``panels``, the
    second, below, is ``more``.

    Raises DrawingError as :func:`require_drawable` does.
    """

    def __init__(self, path: Path, size: tuple[float, float], panels: int = 1) -> None:
        require_drawable(path)
        from matplotlib.figure import Figure

        self._path, self._kind = path, path.suffix.lower()
        self._figure = Figure(figsize=size, layout="constrained")
        self.axes: Any = self._figure.add_subplot(panels, 1, 1)
        self.more: Any = self._figure.add_subplot(panels, 1, 2) if panels > 1 else None

    def write(self) -> None:
        """Write the file, whole or not at all."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.backends.backend_svg import FigureCanvasSVG

        canvas = FigureCanvasSVG(self._figure) if self._kind == ".svg" else FigureCanvasAgg(self._figure)
        with write_atomic(self._path) as stream:
            canvas.print_figure(stream, format=self._kind[1:])
