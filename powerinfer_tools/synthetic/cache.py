"""Where synthetic models are kept, so that a second measurement does not write them again."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

from powerinfer_tools.errors import ModelError
from powerinfer_tools.synthetic.models import SHAPES, TYPES, write_synthetic
from powerinfer_tools.synthetic.sparse import Sparsity, write_sparse

#: Changes when the same request would give another file.
_VERSION = 6


@dataclass(frozen=True)
class Request:
    """One synthetic model. ``sparsity`` None: the dense form, a GGUF file that other programs load; else a
    split file of a ReLU model. ``layers`` None: as many as the shape has."""

    shape: str
    row_type: str = "Q4_0"
    layers: int | None = None
    sparsity: Sparsity | None = None

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ModelError(f"shape {self.shape!r} is not known (known: {', '.join(sorted(SHAPES))})")
        if self.row_type not in TYPES:
            raise ModelError(f"type {self.row_type!r} is not known (known: {', '.join(TYPES)})")
        most = SHAPES[self.shape].layers
        if self.layers is not None and not 1 <= self.layers <= most:
            raise ModelError(f"{self.shape} has {most} layers, {self.layers} cannot be made")

    @property
    def name(self) -> str:
        """What the model is called: everything that it depends on."""
        cut = f"-{self.layers}layers" if self.layers else ""
        sparse = f"-density{self.sparsity.density:g}-skew{self.sparsity.skew:g}" if self.sparsity else ""
        return f"{self.shape}{cut}-{self.row_type}{sparse}"

    @property
    def file_name(self) -> str:
        """The file's name in a cache."""
        kind = "powerinfer.gguf" if self.sparsity else "gguf"
        return f"{self.name}-v{_VERSION}.{kind}"

    def write(self, path: Path) -> int:
        """Write the model; its size in bytes. Raises ModelError, FormatError or OSError."""
        shape = SHAPES[self.shape]
        if self.layers:
            shape = replace(shape, layers=self.layers)
        if self.sparsity:
            return write_sparse(path, self.name, shape, self.row_type, self.sparsity)
        return write_synthetic(path, self.name, shape, self.row_type)


def default_cache() -> Path:
    """$POWERINFER_CACHE, else the user's cache directory."""
    named = os.environ.get("POWERINFER_CACHE")
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "powerinfer"


def cached(request: Request, cache: Path) -> tuple[Path, bool]:
    """The model's file under ``cache``, and whether it was written now."""
    path = cache / "synthetic" / request.file_name
    if path.is_file():
        return path, False
    path.parent.mkdir(parents=True, exist_ok=True)
    request.write(path)
    return path, True


def clear(cache: Path) -> int:
    """Remove all synthetic models under ``cache``; how many bytes that frees."""
    freed = 0
    for path in sorted((cache / "synthetic").glob("*.gguf")):
        freed += path.stat().st_size
        path.unlink()
    return freed
