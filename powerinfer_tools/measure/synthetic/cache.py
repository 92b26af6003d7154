"""Where synthetic models are kept, so that a second measurement does not write them again."""

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from powerinfer_tools import detect
from powerinfer_tools.engine.memory import MARGIN
from powerinfer_tools.errors import ModelError
from powerinfer_tools.measure.synthetic.models import TYPES, tensors_of, write_synthetic
from powerinfer_tools.measure.synthetic.shapes import SHAPES, Shape
from powerinfer_tools.measure.synthetic.sparse import Sparsity, write_sparse
from powerinfer_tools.measure.synthetic.topics import Topics
from powerinfer_tools.model.architectures import RELU_FAMILY

#: Changes when the same request would give another file.
_VERSION = 7


@dataclass(frozen=True)
class Request:
    """One synthetic model. ``sparsity`` None: the dense form, a GGUF file that other programs load; else a
    split file of a ReLU model, or a source model of which that share of each expert's neurons fires.
    ``layers`` None: as many as the shape has. ``topics``: how routers choose; None: all experts equally
    often."""

    shape: str
    row_type: str = "Q4_0"
    layers: int | None = None
    sparsity: Sparsity | None = None
    topics: Topics | None = None

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ModelError(f"shape {self.shape!r} is not known (known: {', '.join(sorted(SHAPES))})")
        if self.row_type not in TYPES:
            raise ModelError(f"type {self.row_type!r} is not known (known: {', '.join(TYPES)})")
        most = SHAPES[self.shape].layers
        if self.layers is not None and not 1 <= self.layers <= most:
            raise ModelError(f"{self.shape} has {most} layers, {self.layers} cannot be made")
        if self.topics and not SHAPES[self.shape].experts:
            raise ModelError(f"{self.shape} has no experts, and so no routers that topics could be made for")
        if self.sparsity and SHAPES[self.shape].experts:
            self._require_zeros(self.sparsity)

    def _require_zeros(self, sparsity: Sparsity) -> None:
        """Raise ModelError where no share of an expert's neurons can fire: up to half of them, all equally
        often."""
        shape = SHAPES[self.shape]
        if (shape.activation or shape.spec.activation) not in RELU_FAMILY:
            raise ModelError(
                f"{self.shape} has experts whose activation makes no zeros, so all neurons of those that a "
                "token takes are computed; leave out --density, and --mode other than dense"
            )
        if sparsity.skew or sparsity.density > 0.5:
            raise ModelError(
                f"{self.shape}: neurons of experts fire equally often, and at most half of them; leave out "
                "--skew, and ask for a --density up to 0.5"
            )

    @property
    def name(self) -> str:
        """What the model is called: everything that it depends on."""
        cut = f"-{self.layers}layers" if self.layers else ""
        sparse = f"-density{self.sparsity.density:g}-skew{self.sparsity.skew:g}" if self.sparsity else ""
        topics = f"-locality{self.topics.locality:g}-skew{self.topics.skew:g}" if self.topics else ""
        return f"{self.shape}{cut}-{self.row_type}{sparse}{topics}"

    @property
    def file_name(self) -> str:
        """The file's name in a cache."""
        kind = "powerinfer.gguf" if self.sparsity and not SHAPES[self.shape].experts else "gguf"
        return f"{self.name}-v{_VERSION}.{kind}"

    @property
    def sizes(self) -> Shape:
        """The shape with as many layers as were asked for."""
        shape = SHAPES[self.shape]
        return replace(shape, layers=self.layers) if self.layers else shape

    def write(self, path: Path) -> int:
        """Write the model; its size in bytes.

        Raises ModelError where there is no room for it, in the file's folder or in memory, before anything
        is written; FormatError or OSError where writing fails.
        """
        shape = self.sizes
        self._require_room(shape, "the disk", shutil.disk_usage(path.parent).free)
        if not shape.experts:  # those are read from disk
            self._require_room(shape, "memory", detect.available_ram_bytes())
        if self.sparsity and not shape.experts:
            return write_sparse(path, self.name, shape, self.row_type, self.sparsity)
        density = self.sparsity.density if self.sparsity else None
        return write_synthetic(path, self.name, shape, self.row_type, topics=self.topics, density=density)

    def _require_room(self, shape: Shape, where: str, free: int) -> None:
        """``free`` is 0 where that is not known."""
        room, nbytes = free - MARGIN, weight_bytes(shape, self.row_type)
        if not free or nbytes <= room:
            return
        one, two = (weight_bytes(replace(shape, layers=count), self.row_type) for count in (1, 2))
        fit = 1 + (room - one) // (two - one) if one <= room else 0
        what = f"ask for fewer layers (--layers {fit})" if fit else "take a smaller shape or type"
        raise ModelError(
            f"{self.name}: {nbytes >> 20} MiB of weights do not fit in the {max(room, 0) >> 20} MiB that "
            f"{where} has to spare; {what}"
        )


def weight_bytes(shape: Shape, row_type: str) -> int:
    """Size of the weights of the dense form; a split file has predictors besides."""
    return sum(tensor.nbytes for tensor in tensors_of(shape, row_type))


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
