"""The relufied model as a GGUF file: the source with other FFN weights and a note of its activation."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from powerinfer_formats.gguf_layout import DEFAULT_ALIGNMENT, ValueType
from powerinfer_formats.gguf_writer import GGUFWriter
from powerinfer_formats.split_layout import source_names
from powerinfer_kernels import WRITTEN_TYPES, RowType, block_shape, dequantize, quantize
from powerinfer_tools.errors import ConvertError
from powerinfer_tools.model.ffn_matrices import DenseFFN
from powerinfer_tools.model.loading import Model
from powerinfer_tools.model.tensors import Weight

#: Metadata that say something else of the result than of the source.
REPLACED_KEYS = (
    "general.name",
    "powerinfer.activation",
    "powerinfer.activation_threshold",
    "powerinfer.relufied_from",
)
Floats = npt.NDArray[np.float32]
#: Layer, "gate", "up" or "down", and that matrix of the source to the one to write, both (rows, columns).
Changed = Callable[[int, str, Floats], Floats]


def ffn_type(quant: str | None, *widths: int) -> RowType:
    """Row type of the FFN: ``quant``, else Q8_0, whose error is far below that of the distillation.

    Raises ConvertError for a type that cannot be written or rows that are not whole blocks of it.
    """
    try:
        chosen = RowType[(quant or "Q8_0").upper()]
    except KeyError:
        chosen = None
    if chosen not in WRITTEN_TYPES:
        names = ", ".join(row_type.name for row_type in WRITTEN_TYPES)
        raise ConvertError(f"--quant {quant}: the FFN can be written as {names}")
    if any(width % block_shape(chosen)[0] for width in widths):
        raise ConvertError(f"--quant {chosen.name}: rows of {widths} values are not whole blocks; take F16")
    return chosen


def export(
    model: Model, changed: Changed, target: tuple[str, float], row_type: RowType, output: Path
) -> None:
    """Write ``output``: all of ``model`` but the FFNs, whose matrices are what ``changed`` gives.

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
            writer.declare(name, row_type if name in matrices else info.row_type, info.shape)
        for name in model.source.tensors:
            if name in matrices:
                index, kind = matrices[name]
                values = changed(index, kind, source_matrix(model, index, kind))
                writer.write(name, quantize(np.ascontiguousarray(values, np.float32), row_type))
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
