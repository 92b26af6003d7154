"""convert --format powerinfer: a model as the original PowerInfer loads it.

Matrices keep their bits where the original can multiply with them; the down projection is transposed, as F16
or Q4_0. Predictors are brought into its form, see :mod:`.refit`; what that costs is
measured on a trace.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from powerinfer_formats.gguf_layout import ValueType
from powerinfer_formats.gguf_writer import GGUFWriter
from powerinfer_formats.predictors import Quality
from powerinfer_formats.split_layout import source_names
from powerinfer_kernels import RowType, block_shape, dequantize, quantize
from powerinfer_tools.errors import ConvertError
from powerinfer_tools.model import original_layout as layout
from powerinfer_tools.model.loading import Model, load_model
from powerinfer_tools.model.source_rows import Bytes, check_finite, relative_error
from powerinfer_tools.model.split_rows import plain_rows, transposed_down
from powerinfer_tools.model.tensors import Weight
from powerinfer_tools.progress import Progress, Silent
from powerinfer_tools.stages.original.exported_predictors import PredictorSource, open_source_of_predictors

#: Metadata that only our files have, or that would speak of other tensors.
_OURS = ("powerinfer.activation", layout.KEY_THRESHOLD)


@dataclass(frozen=True)
class ExportOptions:
    """What to write. ``quant`` names the type of all FFN matrices; None keeps gate and up as they are, and
    the down projection where it is F16 or Q4_0, else makes it F16. Without ``predictors`` every neuron is
    computed. ``trace`` is needed to bring our own predictors into the other form."""

    model: Path
    output: Path
    predictors: Path | None = None
    trace: Path | None = None
    quant: str | None = None


@dataclass(frozen=True)
class ExportReport:
    """What was written. ``requantization_error`` is ‖D' − D‖ / ‖D‖ of the down projection, per layer;
    ``quality`` that of each layer's predictor in its new form, and ``source_quality`` what it was; both are
    empty where nothing was measured."""

    output: str
    nbytes: int
    source_bytes: int
    layers: int
    down_type: str
    requantization_error: tuple[float, ...]
    predictors: str
    predictor_ranks: tuple[int, ...]
    predictor_bytes: int
    source_quality: tuple[Quality, ...]
    quality: tuple[Quality, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return vars(self) | {
            "requantization_error": list(self.requantization_error),
            "predictor_ranks": list(self.predictor_ranks),
            "source_quality": [vars(quality) for quality in self.source_quality],
            "quality": [vars(quality) for quality in self.quality],
        }


def export(options: ExportOptions, progress: Progress | None = None) -> ExportReport:
    """Write the file. Nothing stands under ``output`` until it is complete.

    Raises ConvertError for models and predictors that the original cannot compute with, FormatError for files
    that are not well-formed or cannot be written.
    """
    model = load_model(options.model)
    try:
        _check(model)
        with open_source_of_predictors(model, options.predictors, options.trace) as predictors:
            return _Export(model, predictors, options, progress or Silent()).run()
    finally:
        model.close()


def _check(model: Model) -> None:
    hyper, spec, where = model.hyper, model.spec, model.path
    if model.is_split:
        kind = "a model of the original PowerInfer" if model.is_original else "a split file"
        raise ConvertError(f"{where} is {kind} already; start from the source model")
    model.require_one_ffn(ConvertError, "convert --format powerinfer")
    activation = layout.ACTIVATIONS.get(spec.name)
    if activation is None:
        raise ConvertError(
            f"{where}: the original PowerInfer knows {', '.join(layout.ACTIVATIONS)}, not {spec.name}"
        )
    if hyper.activation != activation:
        raise ConvertError(
            f"{where}: the original PowerInfer computes {spec.name} with {activation}, this model has "
            f"{hyper.activation}"
        )
    if hyper.neurons <= layout.MOST_NEURONS_UNREAD:
        raise ConvertError(
            f"{where}: the original PowerInfer reads predictors of layers of more than "
            f"{layout.MOST_NEURONS_UNREAD} neurons, these have {hyper.neurons}"
        )
    if hyper.heads * hyper.head_dim != hyper.width:
        raise ConvertError(
            f"{where}: {hyper.heads} heads of {hyper.head_dim} values are not the width {hyper.width}, which "
            "the original PowerInfer takes for granted"
        )
    if model.positions is not None and model.positions.rows != layout.POSITIONS:
        raise ConvertError(
            f"{where}: the original PowerInfer expects a table of {layout.POSITIONS} positions, this one has "
            f"{model.positions.rows}"
        )
    if any(factors is not None for factors in vars(model.rope_factors).values()):
        raise ConvertError(f"{where}: the original PowerInfer does not know divisors of rotary frequencies")


class _Export:
    """One run of export."""

    def __init__(
        self, model: Model, predictors: PredictorSource, options: ExportOptions, progress: Progress
    ) -> None:
        self.model, self.predictors, self.options, self.progress = model, predictors, options, progress
        self.quant = None if options.quant is None else RowType[options.quant.upper()]
        first = model.layers[0].source_ffn.down.row_type
        self.down_type = self.quant or (first if first in layout.DOWN_TYPES else RowType.F16)
        if model.hyper.width % block_shape(self.down_type)[0]:
            raise ConvertError(
                f"{model.path}: rows of {model.hyper.width} values are no {self.down_type.name}"
            )
        self.errors: list[float] = []
        self.predictor_bytes = 0

    def run(self) -> ExportReport:
        with GGUFWriter(self.options.output, magic=layout.MAGIC) as writer:
            writer.copy_metadata(self.model.source, without=_OURS)
            writer.add(layout.KEY_THRESHOLD, self.predictors.threshold, ValueType.FLOAT32)
            self._declare(writer)
            self._write(writer)
            self.model.source.require_unchanged()
        return ExportReport(
            output=str(self.options.output),
            nbytes=self.options.output.stat().st_size,
            source_bytes=self.model.source.nbytes,
            layers=self.model.hyper.layers,
            down_type=self.down_type.name,
            requantization_error=tuple(self.errors),
            predictors=self.predictors.name,
            predictor_ranks=tuple(map(self.predictors.rank, range(self.model.hyper.layers))),
            predictor_bytes=self.predictor_bytes,
            source_quality=tuple(self.predictors.source_quality),
            quality=tuple(self.predictors.quality),
        )

    def _declare(self, writer: GGUFWriter) -> None:
        for name, source in self._others():
            info = self.model.source.info(source)
            writer.declare(name, self._stored(info.row_type), info.shape)
        hyper = self.model.hyper
        for index in range(hyper.layers):
            for kind, row_type in self._ffn_types(index).items():
                writer.declare(layout.ffn_name(index, kind), row_type, (hyper.neurons, hyper.width))
            rank = self.predictors.rank(index)
            inward, outward = layout.predictor_names(index)
            for name, shape in ((inward, (rank, hyper.width)), (outward, (hyper.neurons, rank))):
                info = writer.declare(name, self.predictors.row_type, shape)
                self.predictor_bytes += info.nbytes

    def _write(self, writer: GGUFWriter) -> None:
        layers = self.model.hyper.layers
        self.progress.start("writing", layers + 1, "layers")
        for name, source in self._others():
            writer.write(name, self._converted(source))
        self.progress.advance(1)
        for index in range(layers):
            self._write_layer(writer, index)
            self.progress.advance(1)
        self.progress.finish()

    def _write_layer(self, writer: GGUFWriter, index: int) -> None:
        ffn, types = self.model.layers[index].source_ffn, self._ffn_types(index)
        weights = {"gate": ffn.gate, "up": ffn.up}
        for kind, row_type in types.items():
            weight = weights.get(kind)
            if weight is not None:
                check_finite(self.model, weight)
                writer.write(layout.ffn_name(index, kind), self._as(weight, row_type))
        check_finite(self.model, ffn.down)
        values = transposed_down(ffn)
        rows = self._quantized(values, self.down_type, ffn.down.name)
        self.errors.append(relative_error(values, rows, self.down_type))
        writer.write(layout.ffn_name(index, "down"), rows)
        for name, matrix in zip(layout.predictor_names(index), self.predictors.matrices(index), strict=True):
            writer.write(name, self._quantized(matrix, self.predictors.row_type, name))

    def _ffn_types(self, index: int) -> dict[str, RowType]:
        """Row types of what is written, in this order."""
        ffn = self.model.layers[index].source_ffn
        types = {kind: weight.row_type for kind, weight in (("gate", ffn.gate), ("up", ffn.up)) if weight}
        return {kind: self.quant or RowType(self._stored(kind_)) for kind, kind_ in types.items()} | {
            "down": self.down_type
        }

    def _others(self) -> list[tuple[str, str]]:
        """Every other tensor by its name here and in the source. The original wants a head of its own."""
        ffn = {name for index in range(self.model.hyper.layers) for name in source_names(index)}
        names = [
            (name.replace("ffn_down.bias", "ffn_down_t.bias"), name)
            for name in self.model.source.tensors
            if name not in ffn
        ]
        if self.model.head is self.model.embedding and self.model.spec.name in layout.OWN_HEAD:
            names.append(("output.weight", self.model.embedding.name))
        return names

    def _stored(self, row_type: int) -> int:
        """The type that it is written in: its own, but F16 for one that the original does not know."""
        storable = row_type in layout.MATRIX_TYPES or row_type not in set(RowType)
        return row_type if storable else int(RowType.F16)

    def _converted(self, name: str) -> Bytes:
        info = self.model.source.info(name)
        data = self.model.source.tensor(name)
        if self._stored(info.row_type) == info.row_type:
            return data
        rows, columns = info.shape
        return self._as(Weight(name, RowType(info.row_type), rows, columns, data), RowType.F16)

    def _as(self, weight: Weight, row_type: int) -> Bytes:
        """The rows of ``weight`` in another type, or as they are."""
        if weight.row_type == row_type:
            return plain_rows(weight)
        values = dequantize(weight.data, weight.row_type, weight.rows, weight.columns)
        return self._quantized(values, RowType(row_type), weight.name)

    def _quantized(self, values: npt.NDArray[np.float32], row_type: RowType, name: str) -> Bytes:
        if row_type is RowType.F16 and np.abs(values).max() > np.finfo(np.float16).max:
            raise ConvertError(f"{self.model.path}: {name} has values too large for F16")
        return quantize(values, row_type)
