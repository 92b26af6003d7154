"""convert for mixtures of experts: experts sorted hottest first, every matrix with the source's bits.

Works layer by layer, matrix by matrix, so memory does not grow with the number of layers.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from powerinfer_formats.gguf_writer import GGUFWriter
from powerinfer_formats.plan import Plan
from powerinfer_formats.profile import ROUTING, Profile
from powerinfer_formats.split_experts import (
    ExpertsHeader,
    ExpertSizes,
    declare_experts,
    experts_name,
    order_name,
    source_name,
)
from powerinfer_formats.split_layout import ALIGNMENT, KINDS
from powerinfer_tools import __version__
from powerinfer_tools.errors import ConvertError
from powerinfer_tools.model.ffn_matrices import ExpertsFFN
from powerinfer_tools.model.hyperparameters import Routing
from powerinfer_tools.model.loading import Model
from powerinfer_tools.model.source_rows import check_finite, layer_weights, shared_weights
from powerinfer_tools.model.split_rows import planned_devices
from powerinfer_tools.progress import Progress


@dataclass(frozen=True)
class ConvertedExperts:
    """What was written: ``count`` experts of each layer, of which ``hot`` are hot; ``hot_shared``: whether
    the one that every token takes is, empty where there is none."""

    count: int
    hot: tuple[int, ...]
    hot_shared: tuple[bool, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"count": self.count, "hot": list(self.hot), "hot_shared": list(self.hot_shared)}


def check_placement(model: Model, profile: Profile, plan: Plan) -> None:
    """Raise ConvertError for a profile that counts no experts, or a plan of other ones, or of more."""
    routing = _routing(model)
    if profile.activation != ROUTING or profile.layers != model.hyper.layers:
        raise ConvertError(
            f"the profile counts {profile.activation} in {profile.layers} layers, not the experts of "
            f"{model.hyper.layers}; make one with powerinfer profile"
        )
    for layer in range(profile.layers):
        if profile.neurons(layer) != routing.experts:
            raise ConvertError(
                f"the profile counts {profile.neurons(layer)} experts in layer {layer}, {model.name} has "
                f"{routing.experts}; make one with powerinfer profile"
            )
    experts, shared = plan.model.experts, routing.shared_neurons
    sizes = (model.hyper.layers, routing.experts, model.hyper.neurons, shared)
    planned = (
        None if experts is None else (plan.model.layers, experts.count, plan.group, experts.shared_neurons)
    )
    if planned != sizes:
        found = "no experts" if planned is None else f"{planned[1]} experts of {planned[2]} neurons"
        raise ConvertError(
            f"the plan has {found} in {plan.model.layers} layers, {model.name} has {sizes[1]} of {sizes[2]} "
            f"in {sizes[0]}; plan again"
        )


def write_experts(
    model: Model, profile: Profile, plan: Plan, output: Path, progress: Progress
) -> ConvertedExperts:
    """Write the split file. Nothing stands under ``output`` until it is complete.

    Raises ConvertError for weights that are not finite, FormatError for what cannot be written.
    """
    routing, layers = _routing(model), range(model.hyper.layers)
    hot = tuple(layer.hot_neurons // plan.group for layer in plan.layers)
    shared = tuple(layer.shared_expert == "gpu" for layer in plan.layers) if routing.shared_neurons else ()
    _check_weights(model, progress)
    header = ExpertsHeader(
        source_fingerprint=model.fingerprint,
        hot=hot,
        hot_shared=shared,
        tool_version=__version__,
        corpus_hashes=tuple(entry.sha256 for entry in profile.corpus),
        corpus_tokens=profile.tokens,
        devices=planned_devices(plan),
    )
    with GGUFWriter(output, alignment=ALIGNMENT) as writer:
        writer.copy_metadata(model.gguf)
        header.write(writer)
        for index in layers:
            types = tuple(int(stack.row_type) for stack in _experts(model, index).stacks)
            declare_experts(writer, index, _sizes(model, routing), types)
        for name in _unchanged(model):
            info = model.gguf.info(name)
            writer.declare(name, info.row_type, info.shape)
        _write(writer, model, profile, progress)
        model.gguf.require_unchanged()
    return ConvertedExperts(routing.experts, hot, shared)


def _write(writer: GGUFWriter, model: Model, profile: Profile, progress: Progress) -> None:
    layers = model.hyper.layers
    progress.start("writing", layers + 1, "layers")
    for index in range(layers):
        order = profile.order(index)
        writer.write(order_name(index), order.astype("<i4"))
        for kind, stack in zip(KINDS, _experts(model, index).stacks, strict=True):
            for expert in order.tolist():
                matrix = stack.matrix(f"expert {expert}", expert, len(order))
                writer.write(experts_name(index, kind), matrix.data)
        progress.advance(1)
    for name in _unchanged(model):
        writer.write(name, model.gguf.tensor(name))
    progress.advance(1)
    progress.finish()


def _check_weights(model: Model, progress: Progress) -> None:
    layers = model.hyper.layers
    progress.start("checking weights", layers + 1, "layers")
    for weight in shared_weights(model):
        check_finite(model, weight)
    progress.advance(1)
    for index in range(layers):
        for weight in layer_weights(model, index):
            check_finite(model, weight)
        progress.advance(1)
    progress.finish()


def _unchanged(model: Model) -> list[str]:
    """Tensors that are passed on."""
    sorted_ones = {source_name(index, kind) for index in range(model.hyper.layers) for kind in KINDS}
    return [name for name in model.gguf.tensors if name not in sorted_ones]


def _sizes(model: Model, routing: Routing) -> ExpertSizes:
    hyper = model.hyper
    return ExpertSizes(
        hyper.layers, routing.experts, hyper.neurons, hyper.width, shared=routing.shared_neurons > 0
    )


def _routing(model: Model) -> Routing:
    assert model.hyper.routing is not None
    return model.hyper.routing


def _experts(model: Model, index: int) -> ExpertsFFN:
    ffn = model.layers[index].ffn
    assert isinstance(ffn, ExpertsFFN)
    return ffn
