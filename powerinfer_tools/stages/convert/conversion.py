"""convert: a source model, its profile and a plan become one split file.

Works layer by layer, so memory does not grow with the number of layers; what a layer becomes is in
:mod:`powerinfer_tools.stages.convert.layer_content`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from powerinfer_formats.gguf_layout import ValueType
from powerinfer_formats.gguf_writer import GGUFWriter
from powerinfer_formats.plan import Plan
from powerinfer_formats.profile import Profile
from powerinfer_formats.records import to_plain
from powerinfer_formats.split_devices import SplitDevices
from powerinfer_formats.split_layout import (
    ALIGNMENT,
    KEY_REQUANTIZATION_ERROR,
    SplitHeader,
    SplitPrediction,
)
from powerinfer_formats.split_thresholds import SplitThresholding
from powerinfer_tools import __version__
from powerinfer_tools.errors import ConvertError
from powerinfer_tools.model import original_layout as original
from powerinfer_tools.model.loading import load_model
from powerinfer_tools.model.source_rows import check_finite, layer_weights, shared_weights
from powerinfer_tools.model.split_rows import planned_devices
from powerinfer_tools.progress import Progress, Silent
from powerinfer_tools.stages.convert.belonging import Inputs
from powerinfer_tools.stages.convert.layer_content import layer_content
from powerinfer_tools.stages.convert.selection import Selection

#: Options that change what is computed.
_CHANGING = ("quant", "predictors", "thresholds")


@dataclass(frozen=True)
class ConvertOptions:
    """What to convert. ``quant`` names the down projection's row type; None chooses.
    ``other_profile``: the plan may have been made from another profile."""

    model: Path
    profile: Path
    plan: Path
    output: Path
    quant: str | None = None
    predictors: Path | None = None
    thresholds: Path | None = None
    other_profile: bool = False


@dataclass(frozen=True)
class ConvertedExperts:
    """``count`` experts of each layer that has some, of which ``hot`` are hot; ``hot_shared``: of all layers,
    whether the one that every token takes is, empty where there is none."""

    count: int
    hot: tuple[int, ...]
    hot_shared: tuple[bool, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"count": self.count, "hot": list(self.hot), "hot_shared": list(self.hot_shared)}


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
        model.require_placeable(ConvertError, "convert")
        inputs = Inputs(model, Profile.load(options.profile, counts_alone=True), Plan.load(options.plan))
        inputs.require_together(options.profile, options.plan, other_profile=options.other_profile)
        if model.hyper.routing is not None:
            some = model.exact_zeros and any(facts.ffn == "dense" for facts in model.hyper.facts)
            _refuse_for_experts(options, ("predictors", "thresholds") if some else _CHANGING)
        return _Conversion(inputs, options, progress or Silent()).run()
    finally:
        model.close()


class _Conversion:
    """One run of convert."""

    def __init__(self, inputs: Inputs, options: ConvertOptions, progress: Progress) -> None:
        self.model, self.profile, self.plan = inputs.model, inputs.profile, inputs.plan
        self.options, self.progress = options, progress
        self.selection = Selection.open(self.model, options.predictors, options.thresholds)
        self.selection.require_for(self.plan, options.plan)
        self.layers = layer_content(self.model, self.profile, self.plan, self.selection, options.quant)

    def run(self) -> ConvertReport:
        header = self._header((0.0,) * self.model.hyper.layers)
        with GGUFWriter(self.options.output, alignment=ALIGNMENT) as writer:
            # Of neurons, the header says the activation.
            said = ("powerinfer.activation", original.KEY_THRESHOLD) if any(self.layers.types) else ()
            writer.copy_metadata(self.model.source, without=said)
            header.write(writer)
            errors = self._write(writer)
            if header.row_layers:
                writer.replace(KEY_REQUANTIZATION_ERROR, errors, ValueType.FLOAT32)
            self.model.source.require_unchanged()
        experts = None
        if header.experts:
            hot = tuple(
                count // header.group
                for layer, count in enumerate(header.hot_neurons)
                if layer not in header.dense
            )
            experts = ConvertedExperts(header.experts, hot, header.hot_shared)
        return ConvertReport(
            output=str(self.options.output),
            nbytes=self.options.output.stat().st_size,
            source_bytes=self.model.source.nbytes,
            layers=self.model.hyper.layers,
            neurons=self.plan.model.neurons,
            hot_neurons=header.hot_neurons,
            down_type=self.layers.down_type,
            requantization_error=errors,
            prediction=header.prediction,
            thresholding=header.thresholding,
            experts=experts,
            devices=header.devices,
        )

    def _header(self, errors: tuple[float, ...]) -> SplitHeader:
        plan, profile, routing = self.plan, self.profile, self.model.hyper.routing
        shared = [layer.shared_expert == "gpu" for layer in plan.layers]
        dense = plan.model.experts.dense if plan.model.experts else None
        return SplitHeader(
            source_fingerprint=self.model.fingerprint,
            activation=self.model.hyper.activation,
            group=plan.group,
            hot_neurons=tuple(layer.hot_neurons for layer in plan.layers),
            modes=tuple(layer.mode for layer in plan.layers),
            types=self.layers.types,
            requantization_error=errors,
            tool_version=__version__,
            corpus_hashes=tuple(entry.sha256 for entry in profile.corpus),
            corpus_tokens=profile.tokens,
            prediction=self.selection.prediction(),
            thresholding=self.selection.thresholding(),
            devices=planned_devices(plan),
            columns=self.layers.columns,
            experts=0 if routing is None else routing.experts,
            hot_shared=tuple(shared) if routing is not None and routing.shared_neurons else (),
            dense=() if dense is None else dense.layers,
            dense_neurons=0 if dense is None else dense.neurons,
            dense_group=dense.group if dense is not None and any(self.layers.types) else 0,
            expert_gate=routing is None or self.model.spec.gated,
        )

    def _unchanged(self) -> list[tuple[str, str]]:
        """Tensors that are passed on, by their names here and in the source."""
        replaced = self.layers.replaced()
        names = (name for name in self.model.source.tensors if name not in replaced)
        return [(name.replace("ffn_down_t.bias", "ffn_down.bias"), name) for name in names]

    def _write(self, writer: GGUFWriter) -> tuple[float, ...]:
        """Check that all weights are finite, and write them; what requantising adds to each layer."""
        layers, source = self.model.hyper.layers, self.model.source
        for index in range(layers):
            self.layers.declare(writer, index)
        for name, original_name in self._unchanged():
            info = source.info(original_name)
            writer.declare(name, info.row_type, info.shape)
        self.progress.start("converting", layers + 1, "layers")
        for weight in shared_weights(self.model):
            check_finite(self.model, weight)
        errors = []
        for index in range(layers):
            for weight in layer_weights(self.model, index):
                check_finite(self.model, weight)
            errors.append(self.layers.write(writer, index))
            self.progress.advance(1)
        for name, original_name in self._unchanged():
            writer.write(name, source.tensor(original_name))
        self.progress.advance(1)
        self.progress.finish()
        return tuple(errors)


def _refuse_for_experts(options: ConvertOptions, names: Sequence[str]) -> None:
    """Raise ConvertError for options that would change bits of experts, or skip neurons of theirs."""
    for name in names:
        value = getattr(options, name)
        if value is not None:
            raise ConvertError(
                f"--{name} {value}: experts are placed as wholes and keep the source's bits; leave it out"
            )
