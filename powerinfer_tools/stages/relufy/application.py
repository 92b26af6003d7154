"""The relufied model from its source and a delta, bit for bit, without torch."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from powerinfer_formats.delta import Change, Delta, DeltaHeader
from powerinfer_formats.errors import OtherModel
from powerinfer_kernels import RowType
from powerinfer_tools.errors import ConvertError, ModelError
from powerinfer_tools.model.loading import Model, load_model
from powerinfer_tools.stages.relufy.error_passing import round_rows
from powerinfer_tools.stages.relufy.export import (
    Bytes,
    FFNTypes,
    Floats,
    Rows,
    export,
    rescaled,
    source_matrix,
)


@dataclass(frozen=True)
class DeltaReport:
    """The model that was written, and what its delta says of it; ``own_thresholds``: neurons differ in what a
    gate must be above."""

    output: str
    header: DeltaHeader
    own_thresholds: bool

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        header = vars(self.header) | {"quality": [vars(quality) for quality in self.header.quality]}
        return {"output": self.output, "own_thresholds": self.own_thresholds} | header


def apply_delta(source: Path, path: Path, output: Path) -> DeltaReport:
    """Write ``output``, the model that the delta ``path`` makes of ``source``.

    It gets its name only when its bits are those that the delta announces. Raises FormatError (OtherModel for
    another source), ModelError, ConvertError.
    """
    delta = Delta.load(path)
    header = delta.header
    model = load_model(source)
    try:
        require_shape(model, delta, path)
        unchecked = output.with_name(f".{output.name}.unchecked.partial")
        try:
            types = FFNTypes(RowType[header.row_type], RowType[header.down_type])
            export(model, rows_of(model, delta, types), (header.activation, header.cut), types, unchecked)
            if file_sha256(unchecked) != header.result_sha256:
                raise ConvertError(f"{path} made other bits than it was to make, so {output} was not written")
            unchecked.replace(output)
        finally:
            unchecked.unlink(missing_ok=True)
    finally:
        model.close()
    own = any(bool((scales != scales[0]).any()) for scales in delta.scales)
    return DeltaReport(str(output), header, own)


def changed(base: Floats, kind: str, scales: Floats | None, change: Change) -> Floats:
    """``base``, the source's ``kind``, after ``change``: that is exact in double precision, one product or
    quotient for a value whose neuron has a scale, one sum, and a rounding to float32."""
    return (rescaled(base, kind, scales) + change.values()).astype(np.float32)


def rows_of(model: Model, delta: Delta, types: FFNTypes) -> Rows:
    """The rows that ``delta`` makes of ``model``."""

    def rows(index: int, kind: str) -> Bytes:
        scales = delta.scales[index] if delta.scales else None
        values = changed(source_matrix(model, index, kind), kind, scales, delta.changes[index][kind])
        passing = delta.passings[index] if delta.passings and kind != "down" else None
        return round_rows(values, types.of(kind), passing)

    return rows


def file_sha256(path: Path) -> str:
    """64 hexadecimal digits of all bytes of the file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def require_shape(model: Model, delta: Delta, path: Path) -> None:
    """Raise OtherModel unless ``delta``, read from ``path``, was made for ``model``; ModelError for a split
    file."""
    if model.is_split:
        raise ModelError(f"{model.path} is a split file; start from the source model")
    delta.require_model(model.fingerprint, model.name, path)
    hyper, header = model.hyper, delta.header
    if (hyper.layers, hyper.width, hyper.neurons) != (header.layers, header.width, header.neurons):
        raise OtherModel(path, f"is of another shape than {model.name!r}")
