"""quantize: a float model, from a directory or a file, becomes a GGUF file with quantised matrices.

A plan counts the bytes that will be read, so a model is quantised before it is planned for, not when it is
converted. Works tensor by tensor, in pieces; what quantising adds to each is measured.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from powerinfer_formats.file_types import file_type_number
from powerinfer_formats.gguf_layout import DEFAULT_ALIGNMENT, ValueType
from powerinfer_formats.gguf_scan import TensorInfo
from powerinfer_formats.gguf_writer import GGUFWriter
from powerinfer_kernels import RowType, block_shape, dequantize, quantize
from powerinfer_tools.errors import ConvertError
from powerinfer_tools.model.loading import Model, load_model
from powerinfer_tools.progress import Progress, Silent

#: Read once a token as a whole, or a row at a time: too few bits there cost more than they save.
_FINER = {"token_embd.weight": RowType.Q8_0, "output.weight": RowType.Q8_0}
#: Tables that are no factors of products, and routers.
_AS_IT_IS = re.compile(
    r"(position_embd|\.ffn_gate_inp|_norm|\.shortconv\.conv|\.ssm_conv1d(_\w)?)\.weight\Z|(?<!\.weight)\Z"
)
_RENEWED = ("general.file_type", "general.quantization_version")
_PIECE_VALUES = 1 << 24  # 64 MiB of float32


@dataclass(frozen=True)
class QuantizeReport:
    """What was written. ``errors`` is ‖W′ − W‖ / ‖W‖ over all layers by kind of matrix, ``worst`` the largest
    of a single one; ``kept`` are matrices that stayed what they were."""

    output: str
    nbytes: int
    source_bytes: int
    row_type: str
    errors: dict[str, float]
    worst: tuple[str, float]
    kept: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return vars(self) | {"worst": list(self.worst), "kept": list(self.kept)}


def quantize_model(
    path: Path, output: Path, row_type: str, progress: Progress | None = None
) -> QuantizeReport:
    """Write ``output``. Nothing stands under that name until it is complete.

    Raises ConvertError for a split file, a model without float matrices and weights that are not finite;
    FormatError and ModelError for what is no model.
    """
    model = load_model(path)
    try:
        if model.is_split:
            raise ConvertError(f"{path} is a split file; quantize starts from the source model")
        return _Quantization(model, output, RowType[row_type.upper()], progress or Silent()).run()
    finally:
        model.close()


class _Quantization:
    """One run."""

    def __init__(self, model: Model, output: Path, row_type: RowType, progress: Progress) -> None:
        self.source, self.output, self.row_type, self.progress = model.source, output, row_type, progress
        self.types = {info.name: self._type_of(info) for info in self.source.tensors.values()}
        self.squares: dict[str, list[tuple[float, float]]] = defaultdict(list)  # by kind: error², weight²
        self.worst = ("", 0.0)

    def run(self) -> QuantizeReport:
        changed = [name for name, kind in self.types.items() if kind != self.source.info(name).row_type]
        if not changed:
            raise ConvertError(f"{self.source.path} has no float matrices to write as {self.row_type.name}")
        self.progress.start("quantising", len(self.types), "tensors")
        with GGUFWriter(self.output, alignment=DEFAULT_ALIGNMENT) as writer:
            writer.copy_metadata(self.source, without=_RENEWED)
            writer.add("general.file_type", file_type_number(self.row_type.name), ValueType.UINT32)
            writer.add("general.quantization_version", 2, ValueType.UINT32)
            for name, info in self.source.tensors.items():
                writer.declare(name, self.types[name], info.shape)
            for name, info in self.source.tensors.items():
                for piece in self._pieces(info) if name in changed else self.source.pieces(name):
                    writer.write(name, piece)
                self.progress.advance(1)
            self.source.require_unchanged()
        self.progress.finish()
        errors = {kind: _relative(squares) for kind, squares in self.squares.items()}
        kept = tuple(n for n in self.types if n not in changed and len(self.source.info(n).shape) > 1)
        return QuantizeReport(
            output=str(self.output),
            nbytes=self.output.stat().st_size,
            source_bytes=self.source.nbytes,
            row_type=self.row_type.name,
            errors=errors,
            worst=self.worst,
            kept=kept,
        )

    def _type_of(self, info: TensorInfo) -> int:
        """What to write a tensor as: vectors, quantised matrices, rows of partial blocks stay as they are."""
        row_type = self.row_type if self.row_type.is_float else _FINER.get(info.name, self.row_type)
        matrix = len(info.shape) > 1 and not _AS_IT_IS.search(info.name)
        floats = info.row_type in {int(kind) for kind in RowType if kind.is_float}
        whole = info.shape[-1] % block_shape(row_type)[0] == 0
        return int(row_type) if matrix and floats and whole else info.row_type

    def _pieces(self, info: TensorInfo) -> Iterator[npt.NDArray[np.uint8]]:
        """The rows in their new type, some at a time."""
        columns = info.shape[-1]
        kind, target = RowType(info.row_type), RowType(self.types[info.name])
        squares, first = [], 0
        for piece in self._rows(info):
            values = dequantize(piece.reshape(-1), kind, len(piece), columns)
            if not np.isfinite(values).all():
                row = first + int(np.argwhere(~np.isfinite(values))[0][0])
                raise ConvertError(
                    f"{self.source.path}: tensor {info.name} has a value that is not finite in row {row}"
                )
            first += len(piece)
            made = quantize(values, target)
            back = dequantize(made.reshape(-1), target, len(piece), columns)
            squares.append((_square(back - values), _square(values)))
            yield made
        self.squares[info.name.removesuffix(".weight").rpartition(".")[2]] += squares
        if _relative(squares) >= self.worst[1]:
            self.worst = (info.name, _relative(squares))

    def _rows(self, info: TensorInfo) -> Iterator[npt.NDArray[np.uint8]]:
        """All rows, uint8 [some, row bytes]: no more than fit a piece."""
        columns = info.shape[-1]
        step = max(1, _PIECE_VALUES // columns)
        for stored in self.source.pieces(info.name):
            rows = stored.reshape(-1, info.nbytes * columns // _values(info))
            for first in range(0, len(rows), step):
                yield np.ascontiguousarray(rows[first : first + step])


def _values(info: TensorInfo) -> int:
    return int(np.prod(info.shape, dtype=object))


def _square(values: npt.NDArray[np.float32]) -> float:
    flat = values.reshape(-1).astype(np.float64)
    return float(flat @ flat)


def _relative(squares: list[tuple[float, float]]) -> float:
    error, whole = (sum(part) for part in zip(*squares, strict=True))
    return float(np.sqrt(error / whole)) if whole else 0.0
