"""The tensors of a model's file, by name and expected shape, as typed views: matrices, vectors and norms.

No weight is copied. Which tensors a model has is not known here: :mod:`powerinfer_tools.model.loading`.
"""

import fnmatch
import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from powerinfer_formats.model_source import ModelSource
from powerinfer_kernels import RowType
from powerinfer_tools.errors import ModelError
from powerinfer_tools.model.architectures import ArchitectureSpec, NormKind
from powerinfer_tools.model.original import is_original

Vector = npt.NDArray[np.float32]
Table = npt.NDArray[np.float32]
#: Row types of matrices that the kernels compute with.
MATRIX_TYPES = frozenset(int(row_type) for row_type in RowType)


@dataclass(frozen=True)
class Weight:
    """A matrix of ``rows`` × ``columns`` as plain rows of blocks, times ``scale``; ``data`` is uint8, all
    rows in order."""

    name: str
    row_type: RowType
    rows: int
    columns: int
    data: npt.NDArray[np.uint8]
    scale: float = 1.0

    @property
    def nbytes(self) -> int:
        """Size of the rows in the file, in bytes."""
        return self.data.nbytes

    def rows_at(self, places: npt.NDArray[np.int64]) -> "Weight":
        """A copy of the rows at ``places``."""
        data = self.data.reshape(self.rows, -1)[places]
        return replace(self, rows=len(places), data=data.reshape(-1))

    def part(self, what: str, first: int, rows: int) -> "Weight":
        """A view of ``rows`` rows from ``first`` on; ``what`` is added to the name for people."""
        size = self.nbytes // self.rows
        data = self.data[first * size : (first + rows) * size]
        return replace(self, name=f"{self.name} ({what})", rows=rows, data=data)


@dataclass(frozen=True)
class Stack:
    """Matrices of one shape as one of ``rows`` × ``columns``, their rows one after the other: in one piece,
    or in a piece for each matrix; ``pieces`` are uint8."""

    name: str
    row_type: RowType
    rows: int
    columns: int
    pieces: tuple[npt.NDArray[np.uint8], ...]

    @property
    def nbytes(self) -> int:
        """Size of the rows in the file, in bytes."""
        return sum(piece.nbytes for piece in self.pieces)

    @property
    def weights(self) -> tuple[Weight, ...]:
        """The pieces as matrices."""
        if len(self.pieces) == 1:
            return (Weight(self.name, self.row_type, self.rows, self.columns, self.pieces[0]),)
        rows = self.rows // len(self.pieces)
        return tuple(
            Weight(f"{self.name} (expert {index})", self.row_type, rows, self.columns, piece)
            for index, piece in enumerate(self.pieces)
        )

    def halves(self, count: int) -> tuple["Stack", "Stack"]:
        """Of each of ``count`` matrices, the first half of the rows, and the second."""
        matrices = [self.matrix(f"matrix {index}", index, count) for index in range(count)]
        rows = self.rows // count // 2
        first, second = (tuple(m.part("half", part * rows, rows).data for m in matrices) for part in (0, 1))
        sizes = (self.row_type, self.rows // 2, self.columns)
        return Stack(self.name, *sizes, first), Stack(self.name, *sizes, second)

    def matrix(self, what: str, index: int, count: int) -> Weight:
        """A view of the matrix ``index`` of ``count``; ``what`` is added to the name for people."""
        rows = self.rows // count
        if len(self.pieces) == 1:
            return self.weights[0].part(what, index * rows, rows)
        return Weight(f"{self.name} ({what})", self.row_type, rows, self.columns, self.pieces[index])


@dataclass(frozen=True)
class Norm:
    """A normalisation by root mean square ("rms"), or by mean and deviation ("layer"), which may have a
    bias."""

    kind: NormKind
    weight: Vector
    bias: Vector | None = None

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)


#: Tensors that may be left out: vision and audio towers and their projectors, layers that predict further
#: tokens, and what tools leave in a file.
LEFT_OUT = ("v.*", "a.*", "mm.*", "*.nextn.*")


class Tensors:
    """Typed access to the tensors of a file, by expected shape."""

    def __init__(self, gguf: ModelSource) -> None:
        self.gguf = gguf

    def leave_out(self, name: str) -> None:
        """Mark a tensor as used."""
        self.gguf.expected.add(name)

    def leave_out_matching(self, pattern: str) -> None:
        """Mark all tensors of such names as used."""
        self.gguf.expected.update(fnmatch.filter(self.gguf.tensors, pattern))

    def leave_out_layer(self, index: int) -> None:
        """Mark all tensors of a layer as used."""
        self.gguf.expected.update(name for name in self.gguf.tensors if name.startswith(f"blk.{index}."))

    def refuse_unused(self) -> None:
        """Raise ModelError for a tensor that nobody expected and that may not be left out."""
        for name, info in self.gguf.tensors.items():
            if name in self.gguf.expected or any(fnmatch.fnmatchcase(name, pattern) for pattern in LEFT_OUT):
                continue
            shape = " × ".join(str(size) for size in info.shape)
            raise ModelError(
                f"{self.gguf.path}: unexpected tensor {name} of {shape} values for this architecture"
            )

    @property
    def down_name(self) -> str:
        """What the files of this kind call the down matrix of a layer."""
        return "ffn_down_t" if is_original(self.gguf) else "ffn_down"

    def has(self, name: str) -> bool:
        """Whether the file has a tensor of that name."""
        return name in self.gguf.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape, rows first. Raises ModelError where it is missing."""
        if not self.has(name):
            raise ModelError(f"{self.gguf.path}: tensor {name} is missing; this file holds no language model")
        return tuple(self.gguf.tensors[name].shape)

    def matrix(self, name: str, rows: int, columns: int) -> Weight:
        """A matrix of a type that the kernels compute with, times its scale where the file has one. Raises
        FormatError for another shape or type."""
        plain, scales = self.table_of_rows(name, rows, columns), self.scales(name, 1)
        return plain if scales is None else replace(plain, scale=float(scales[0]))

    def table_of_rows(self, name: str, rows: int, columns: int) -> Weight:
        """The same of what is read row by row, and has no scale."""
        data = self.gguf.tensor(name, shape=(rows, columns), types=MATRIX_TYPES)
        row_type = RowType(self.gguf.tensors[name].row_type)
        return Weight(name, row_type, rows, columns, np.frombuffer(data, dtype=np.uint8))

    def scales(self, name: str, count: int, base: str = "") -> Vector | None:
        """What the ``count`` matrices of a tensor of NVFP4 rows are times, one for each, from the tensors
        that are called ``base``, else as itself is. Elsewhere such tensors are refused as unexpected.
        Scales of inputs beside them are for products of 4-bit inputs, and change nothing here."""
        base = base or name.removesuffix(".weight")
        if self.gguf.tensors[name].row_type != RowType.NVFP4:
            return None
        if self.has(f"{base}.input_scale"):
            self.vector(f"{base}.input_scale", count)
        return self.optional(f"{base}.scale", count)

    def stack(self, name: str, count: int, rows: int, columns: int) -> Stack:
        """``count`` matrices as one, their rows one after the other."""
        pieces = self.gguf.pieces(name, shape=(count, rows, columns), types=MATRIX_TYPES)
        row_type = RowType(self.gguf.tensors[name].row_type)
        views = tuple(np.frombuffer(piece, dtype=np.uint8) for piece in pieces)
        return Stack(name, row_type, count * rows, columns, views)

    def heads(self, name: str, count: int, rows: int, columns: int) -> tuple[Weight, ...]:
        """A matrix for each of ``count`` heads; of one head, the file may have left out the first number."""
        if count == 1 and self.has(name) and len(self.shape(name)) == 2:
            return (self.matrix(name, rows, columns),)
        stack = self.stack(name, count, rows, columns)
        return tuple(stack.matrix(f"head {index}", index, count) for index in range(count))

    def row(self, name: str, columns: int) -> Weight:
        """A vector as a matrix of one row."""
        return Weight(name, RowType.F32, 1, columns, self.vector(name, columns).view(np.uint8))

    def matrix_or_row(self, name: str, rows: int, columns: int) -> Weight:
        """A matrix; of one row, the file may have left out the first number."""
        if rows == 1 and self.has(name) and len(self.shape(name)) == 1:
            return self.row(name, columns)
        return self.matrix(name, rows, columns)

    def vector(self, name: str, size: int) -> Vector:
        """``size`` values, float32. Raises ModelError where one is not finite."""
        return self.table(name, (size,))

    def table(self, name: str, shape: tuple[int, ...]) -> Table:
        """Values of that shape, float32. Raises ModelError where one is not finite."""
        data = self.gguf.tensor(name, shape=shape, types=frozenset({int(RowType.F32)}))
        values = np.frombuffer(data, dtype=np.float32).reshape(shape)
        if not np.isfinite(values).all():
            raise ModelError(f"{self.gguf.path}: tensor {name} holds values that are not finite")
        return values

    def values(self, name: str, count: int) -> Vector:
        """``count`` values of whatever shape, float32. Raises ModelError for another number of them."""
        shape = self.shape(name)
        if math.prod(shape) != count:
            raise ModelError(
                f"{self.gguf.path}: tensor {name} has {math.prod(shape)} values, expected {count}"
            )
        return self.table(name, shape).reshape(-1)

    def optional(self, name: str, size: int) -> Vector | None:
        """The vector, or None where the file has none."""
        return self.vector(name, size) if self.has(name) else None

    def absent(self, name: str, size: int) -> Vector | None:
        """What the family does not have: a file that carries it is of another family."""
        if self.has(name):
            raise ModelError(
                f"{self.gguf.path}: unexpected tensor {name} of {size} values for this architecture"
            )
        return None

    def norm(self, spec: ArchitectureSpec, name: str, size: int) -> Norm:
        """A norm of the architecture's kind over ``size`` values; of ones, where the family's norms have no
        weights and the file has none."""
        if not spec.norm_weights and not self.has(f"{name}.weight"):
            return Norm(spec.norm, np.ones(size, np.float32))
        bias = self.absent if spec.norm == "rms" and not spec.rms_biases else self.optional
        return Norm(spec.norm, self.vector(f"{name}.weight", size), bias(f"{name}.bias", size))

    def optional_norm(self, spec: ArchitectureSpec, name: str, size: int, *, required: bool) -> Norm | None:
        """A norm that only some architectures have: it must be there exactly where it is ``required``."""
        if required:
            return self.norm(spec, name, size)
        self.absent(f"{name}.weight", size)
        return None
