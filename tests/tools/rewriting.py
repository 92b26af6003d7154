"""A source that another program writes while a stage reads it."""

from pathlib import Path

from powerinfer_tools.progress import Silent


class Rewriting(Silent):
    """Progress that writes the last bytes of the file at ``path`` anew, as they were, when work begins."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def start(self, description: str, total: int | None, unit: str) -> None:
        """Write."""
        with self._path.open("r+b") as stream:
            stream.seek(-4, 2)
            last = stream.read()
            stream.seek(-4, 2)
            stream.write(last)
