"""convert: a source model, its profile and a plan become one split file.

Gate and up rows keep their bits; a permutation of neurons changes nothing. The transposed down projection
of a quantised source has to be quantised again, and the error of that is measured. Works layer by layer, so
memory does not grow with the number of layers.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from powerinfer_formats.block_types import TensorType
from powerinfer_formats.gguf_writer import GGUFWriter
from powerinfer_formats.plan import Plan
from powerinfer_formats.profile import Profile
from powerinfer_formats.records import to_plain
from powerinfer_formats.split_devices import SplitDevices
from powerinfer_formats.split_layout import (
    ALIGNMENT,
    KINDS,
    BundleLayout,
    SplitHeader,
    SplitPrediction,
    bias_name,
    bundle_name,
    columns_name,
    declare_split_layer,
    hot_name,
    order_name,
    source_bias_name,
    source_names,
)
from powerinfer_formats.split_thresholds import SplitThresholding, threshold_name
from powerinfer_kernels import WRITTEN_TYPES, RowType, block_shape
from powerinfer_tools import __version__
from powerinfer_tools.errors import ConvertError
from powerinfer_tools.model import original_layout as original
from powerinfer_tools.model.ffn_matrices import DenseFFN, ExpertsFFN
from powerinfer_tools.model.loading import Model, load_model
from powerinfer_tools.model.source_rows import check_finite, layer_weights, relative_error, shared_weights
from powerinfer_tools.model.split_rows import (
    default_down_type,
    ffn_layout,
    plain_rows,
    planned_devices,
    stored_down,
    transposed_down,
)
from powerinfer_tools.model.tensors import Weight
from powerinfer_tools.progress import Progress, Silent
from powerinfer_tools.stages.convert.belonging import require_same_model, require_same_profile
from powerinfer_tools.stages.convert.expert_conversion import ConvertedExperts, check_placement, write_experts
from powerinfer_tools.stages.convert.selection import Selection


@dataclass(frozen=True)
class ConvertOptions:
    """What to convert. ``quant`` names the down projection's row type; None chooses (see
    :func:`down_type`). ``other_profile``: the plan may have been made from another profile."""

    model: Path
    profile: Path
    plan: Path
    output: Path
    quant: str | None = None
    predictors: Path | None = None
    thresholds: Path | None = None
    other_profile: bool = False


@dataclass(frozen=True)
class ConvertReport:
    """What was written. ``requantization_error`` is ‖D' − D‖ / ‖D‖ of the down projection, per layer.
    ``experts``: of a model that has some; neurons are then those of all experts."""

    output: str
    nbytes: int
    source_bytes: int
    layers: int
    neurons: int
    hot_neurons: tuple[int, ...]
    down_type: str
    requantization_error: tuple[float, ...]
    prediction: SplitPrediction | None = None
    thresholding: SplitThresholding | None = None
    experts: ConvertedExperts | None = None
    devices: SplitDevices | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return vars(self) | {
            "hot_neurons": list(self.hot_neurons),
            "prediction": to_plain(self.prediction),
            "thresholding": vars(self.thresholding) if self.thresholding else None,
            "devices": to_plain(self.devices),
            "experts": self.experts.as_dict() if self.experts else None,
            "requantization_error": list(self.requantization_error),
            "mean_requantization_error": float(np.mean(self.requantization_error)),
        }


def convert(options: ConvertOptions, progress: Progress | None = None) -> ConvertReport:
    """Write the split file. Nothing stands under ``output`` until it is complete.

    Raises ConvertError for a profile or plan of another model and for weights that are not finite,
    OtherProfile for a plan that was made from another profile,
    FormatError for files that are not well-formed or cannot be written.
    """
    model = load_model(options.model)
    try:
        if not model.is_source:
            raise ConvertError(
                f"{options.model} is a split file already; convert starts from the source model"
            )
        model.require_plain(ConvertError, "convert")
        profile, plan = Profile.load(options.profile), Plan.load(options.plan)
        files = (profile, options.profile, plan, options.plan)
        require_same_model(model, *files)
        if not options.other_profile:
            require_same_profile(*files)
        if model.hyper.routing is not None:
            return _convert_experts(model, profile, plan, options, progress or Silent())
        selection = Selection.open(model, options.predictors, options.thresholds)
        selection.require_for(plan, options.plan)
        return _Conversion(model, profile, plan, selection, options, progress or Silent()).run()
    finally:
        model.close()


def down_type(ffn: DenseFFN, quant: str | None, width: int) -> RowType:
    """Row type of the transposed down projection: ``quant``, else the source's own if it is a float, or is
    transposed already and can be written, else Q8_0."""
    if quant is None:
        return default_down_type(ffn)
    try:
        chosen = RowType[quant.upper()]
    except KeyError:
        chosen = None
    if chosen not in WRITTEN_TYPES:
        names = ", ".join(row_type.name for row_type in WRITTEN_TYPES)
        raise ConvertError(f"--quant {quant}: the down projection can be written as {names}")
    if width % block_shape(chosen)[0]:
        raise ConvertError(f"--quant {quant}: rows of {width} values are not whole blocks")
    return chosen


class _Conversion:
    """One run of convert."""

    def __init__(
        self,
        model: Model,
        profile: Profile,
        plan: Plan,
        selection: Selection,
        options: ConvertOptions,
        progress: Progress,
    ) -> None:
        self.model, self.profile, self.plan = model, profile, plan
        self.selection = selection
        self.options, self.progress = options, progress
        self.hot = tuple(layer.hot_neurons for layer in plan.layers)
        self.layouts = tuple(self._layout(self._ffn(i)) for i in range(model.hyper.layers))

    def run(self) -> ConvertReport:
        # The error per layer stands in the header, before any weight: so it is measured in a first pass.
        errors = self._measure()
        header = self._header(errors)
        with GGUFWriter(self.options.output, alignment=ALIGNMENT) as writer:
            writer.copy_metadata(self.model.gguf, without=("powerinfer.activation", original.KEY_THRESHOLD))
            header.write(writer)
            self._declare(writer)
            self._write(writer)
            self.model.gguf.require_unchanged()
        return ConvertReport(
            output=str(self.options.output),
            nbytes=self.options.output.stat().st_size,
            source_bytes=self.model.gguf.nbytes,
            layers=self.model.hyper.layers,
            neurons=self.model.hyper.neurons,
            hot_neurons=self.hot,
            down_type=self.layouts[0].types[-1].name,
            requantization_error=errors,
            prediction=header.prediction,
            thresholding=header.thresholding,
            devices=header.devices,
        )

    def _ffn(self, index: int) -> DenseFFN:
        return self.model.layers[index].source_ffn

    def _layout(self, ffn: DenseFFN) -> BundleLayout:
        return ffn_layout(ffn, down_type(ffn, self.options.quant, ffn.up.columns))

    def _header(self, errors: tuple[float, ...]) -> SplitHeader:
        return SplitHeader(
            source_fingerprint=self.model.fingerprint,
            activation=self.model.hyper.activation,
            group=self.plan.group,
            hot_neurons=self.hot,
            modes=tuple(layer.mode for layer in self.plan.layers),
            types=tuple(layout.types for layout in self.layouts),
            requantization_error=errors,
            tool_version=__version__,
            corpus_hashes=tuple(entry.sha256 for entry in self.profile.corpus),
            corpus_tokens=self.profile.tokens,
            prediction=self.selection.prediction(),
            thresholding=self.selection.thresholding(),
            devices=planned_devices(self.plan),
            columns=any(self._columns(i) is not None for i in range(self.model.hyper.layers)),
        )

    def _columns(self, index: int) -> Weight | None:
        """The down projection as it is, to be kept beside the transposed one that was quantised again: of
        layers that are computed dense where the plan has no hot neurons at all, and no exact zeros, as
        gate-first has to give the bits of dense."""
        ffn = self._ffn(index)
        dense = self.plan.layers[index].mode == "dense" and not self.model.exact_zeros and not any(self.hot)
        return None if ffn.transposed or ffn.down.row_type.is_float or not dense else ffn.down

    def _measure(self) -> tuple[float, ...]:
        """Check that all weights are finite, and measure what requantising adds to each layer."""
        layers = self.model.hyper.layers
        self.progress.start("checking weights", layers + 1, "layers")
        for weight in shared_weights(self.model):
            check_finite(self.model, weight)
        self.progress.advance(1)
        errors = []
        for index in range(layers):
            for weight in layer_weights(self.model, index):
                check_finite(self.model, weight)
            down = transposed_down(self._ffn(index))
            rows = stored_down(self._ffn(index), self._down_type(index))
            errors.append(relative_error(down, rows, RowType(self.layouts[index].types[-1])))
            self.progress.advance(1)
        self.progress.finish()
        return tuple(errors)

    def _declare(self, writer: GGUFWriter) -> None:
        neurons = self.model.hyper.neurons
        for index in range(self.model.hyper.layers):
            columns = self._columns(index)
            declare_split_layer(
                writer,
                index,
                self.layouts[index],
                neurons=neurons,
                hot=self.hot[index],
                bias=self.model.layers[index].ffn_bias is not None,
                columns=None if columns is None else TensorType(columns.row_type),
            )
            predictor = self.selection.predictor(index, self.profile.order(index))
            if predictor is not None:
                predictor.declare(writer, index, self.layouts[index].width)
            if self.selection.threshold(index) is not None:
                writer.declare(threshold_name(index), RowType.F32, (neurons,))
        for name, source in self._unchanged():
            info = self.model.gguf.info(source)
            writer.declare(name, info.row_type, info.shape)

    def _unchanged(self) -> list[tuple[str, str]]:
        """Tensors that are passed on, by their names here and in the source."""
        replaced = set()
        for index in range(self.model.hyper.layers):
            replaced |= {*source_names(index), source_bias_name(index)}
            if self.model.is_original:
                replaced |= {*(original.ffn_name(index, kind) for kind in KINDS)}
                replaced |= {*original.predictor_names(index)}
        names = (name for name in self.model.gguf.tensors if name not in replaced)
        return [(name.replace("ffn_down_t.bias", "ffn_down.bias"), name) for name in names]

    def _write(self, writer: GGUFWriter) -> None:
        layers = self.model.hyper.layers
        self.progress.start("writing", layers + 1, "layers")
        for index in range(layers):
            self._write_layer(writer, index)
            self.progress.advance(1)
        for name, source in self._unchanged():
            writer.write(name, self.model.gguf.tensor(source))
        self.progress.advance(1)
        self.progress.finish()

    def _write_layer(self, writer: GGUFWriter, index: int) -> None:
        order, hot, layout = self.profile.order(index), self.hot[index], self.layouts[index]
        ffn = self._ffn(index)
        products = [plain_rows(weight) for weight in ffn.matrices[:-1]]
        sources = [*products, stored_down(ffn, self._down_type(index))]
        writer.write(order_name(index), order.astype("<i4"))
        bias = self.model.layers[index].ffn_bias
        if bias is not None:
            writer.write(bias_name(index), bias[order])
        if hot:
            for kind, rows in zip(layout.kinds, sources, strict=True):
                writer.write(hot_name(index, kind), rows[order[:hot]])
        if hot < len(order):
            cold = order[hot:]
            records = layout.pack(*(rows[cold] for rows in sources))
            writer.write(bundle_name(index), records)
        columns = self._columns(index)
        if columns is not None:
            writer.write(columns_name(index), columns.data)
        predictor = self.selection.predictor(index, self.profile.order(index))
        if predictor is not None:
            predictor.write(writer, index)
        threshold = self.selection.threshold(index)
        if threshold is not None:
            writer.write(threshold_name(index), threshold[order])

    def _down_type(self, index: int) -> RowType:
        return RowType(self.layouts[index].types[-1])


def _convert_experts(
    model: Model, profile: Profile, plan: Plan, options: ConvertOptions, progress: Progress
) -> ConvertReport:
    """Write the split file of a mixture of experts, which keeps every matrix as it is."""
    for name, value in (
        ("--quant", options.quant),
        ("--predictors", options.predictors),
        ("--thresholds", options.thresholds),
    ):
        if value is not None:
            raise ConvertError(
                f"{name} {value}: experts are placed as wholes and keep the source's bits; leave it out"
            )
    check_placement(model, profile, plan)
    made = write_experts(model, profile, plan, options.output, progress)
    ffn, layers = model.layers[0].ffn, model.hyper.layers
    assert isinstance(ffn, ExpertsFFN)
    return ConvertReport(
        output=str(options.output),
        nbytes=options.output.stat().st_size,
        source_bytes=model.gguf.nbytes,
        layers=layers,
        neurons=made.count * plan.group,
        hot_neurons=tuple(count * plan.group for count in made.hot),
        down_type=ffn.down.row_type.name,
        requantization_error=(0.0,) * layers,
        experts=made,
        devices=planned_devices(plan),
    )
