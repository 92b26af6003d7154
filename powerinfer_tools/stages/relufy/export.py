"""The relufied model as a GGUF file: the source with other FFN weights and a note of its activation."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import numpy.typing as npt

from powerinfer_formats.block_types import RelufiedType
from powerinfer_formats.gguf_layout import DEFAULT_ALIGNMENT, ValueType
from powerinfer_formats.gguf_writer import GGUFWriter
from powerinfer_formats.split_layout import source_names
from powerinfer_kernels import RowType, block_shape, dequantize
from powerinfer_tools.errors import ConvertError
from powerinfer_tools.model.ffn_matrices import DenseFFN
from powerinfer_tools.model.loading import Model
from powerinfer_tools.model.tensors import Weight
from powerinfer_tools.stages.relufy.error_passing import PASSING_TYPES

#: Metadata that say something else of the result than of the source.
REPLACED_KEYS = (
    "general.name",
    "powerinfer.activation",
    "powerinfer.activation_threshold",
    "powerinfer.relufied_from",
)
Floats = npt.NDArray[np.float32]
_RELUFIED = tuple(RowType[name] for name in get_args(RelufiedType))
Bytes = npt.NDArray[np.uint8]
#: Layer and "gate", "up" or "down" to the rows to write, uint8 (rows, row_bytes).
Rows = Callable[[int, str], Bytes]
#: What gate and up are written as where the source has types that are not written here: the next larger.
_INSTEAD = {RowType.Q4_K: RowType.Q4_1, RowType.Q5_K: RowType.Q5_1}


@dataclass(frozen=True)
class FFNTypes:
    """Row types of the written FFNs: ``gate`` of gate and up."""

    gate: RowType
    down: RowType

    def of(self, kind: str) -> RowType:
        """That of ``kind`` ("gate", "up" or "down")."""
        return self.down if kind == "down" else self.gate


def ffn_types(quant: str | None, model: Model) -> FFNTypes:
    """Gate and up in ``quant``, else in the source's type if that has 4 or 5 bits, else in Q8_0; down in the
    same if that rounds to the nearest, else in Q8_0, as ``convert`` writes down rows.

    Raises ConvertError for a type that cannot be written or rows that are not whole blocks of it.
    """
    try:
        chosen = _usual(model) if quant is None else RowType[quant.upper()]
    except KeyError:
        chosen = None
    if chosen not in _RELUFIED:
        names = ", ".join(row_type.name for row_type in _RELUFIED)
        raise ConvertError(f"--quant {quant}: gate and up can be written as {names}")
    widths = (model.hyper.width, model.hyper.neurons)
    types = FFNTypes(chosen, RowType.Q8_0 if chosen in PASSING_TYPES else chosen)
    if any(width % block_shape(row_type)[0] for width in widths for row_type in (types.gate, types.down)):
        raise ConvertError(f"--quant {chosen.name}: rows of {widths} values are not whole blocks; take F16")
    return types


def _usual(model: Model) -> RowType:
    gates = {ffn.first.row_type for ffn in (layer.ffn for layer in model.layers) if isinstance(ffn, DenseFFN)}
    types = {_INSTEAD.get(row_type, row_type) for row_type in gates}
    only = types.pop() if len(types) == 1 else None
    return only if only in PASSING_TYPES else RowType.Q8_0


def export(model: Model, rows: Rows, target: tuple[str, float], types: FFNTypes, output: Path) -> None:
    """Write ``output``: all of ``model`` but the FFNs, whose matrices are what ``rows`` gives.

    ``target`` is their activation, and the cut of fatrelu.
    """
    activation, cut = target
    matrices = {name: place for i in range(model.hyper.layers) for name, place in _places(i).items()}
    with GGUFWriter(output, alignment=DEFAULT_ALIGNMENT) as writer:
        writer.copy_metadata(model.source, without=REPLACED_KEYS)
        writer.add("general.name", f"{model.name} {activation}")
        writer.add("powerinfer.activation", activation)
        if activation == "fatrelu":
            writer.add("powerinfer.activation_threshold", cut, ValueType.FLOAT32)
        writer.add("powerinfer.relufied_from", model.fingerprint)
        for name in model.source.tensors:
            info = model.source.info(name)
            written = types.of(matrices[name][1]) if name in matrices else info.row_type
            writer.declare(name, written, info.shape)
        for name in model.source.tensors:
            if name in matrices:
                writer.write(name, rows(*matrices[name]))
            else:
                writer.write(name, model.source.tensor(name))
        model.source.require_unchanged()


def rescaled(base: Floats, kind: str, scales: Floats | None) -> npt.NDArray[np.float64]:
    """``base``, the source's ``kind`` (rows, columns), with the neurons' ``scales`` (see
    :class:`~powerinfer_formats.delta.Delta`): gate times them, up over them, down as it is."""
    exact = base.astype(np.float64)
    if scales is None or kind == "down":
        return exact
    factors = scales.astype(np.float64)[:, None]
    return exact * factors if kind == "gate" else exact / factors


def source_matrix(model: Model, index: int, kind: str) -> Floats:
    """``kind`` ("gate", "up" or "down") of layer ``index`` as it is in ``model``, (rows, columns)."""
    ffn = model.layers[index].ffn
    assert isinstance(ffn, DenseFFN)
    weight: Weight = getattr(ffn, kind)
    return dequantize(weight.data, weight.row_type, weight.rows, weight.columns)


def _places(index: int) -> dict[str, tuple[int, str]]:
    """The layer's FFN tensors in the source, and which matrix each is."""
    places = {}
    for name in source_names(index):
        kind = next(kind for kind in ("gate", "up", "down") if f"ffn_{kind}." in name)
        places[name] = (index, kind)
    return places
