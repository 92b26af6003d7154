"""The modes that a model allows. The modes gate-first and predicted skip neurons, and need an activation with
exact zeros; mode thresholded is for other activations."""

from powerinfer_formats.modes import MODES
from powerinfer_kernels import Layout
from powerinfer_tools.errors import ModelError
from powerinfer_tools.model.architectures import RELU_FAMILY
from powerinfer_tools.model.ffn_matrices import ExpertsFFN
from powerinfer_tools.model.loading import Model


def layer_modes(model: Model, choice: str | None) -> tuple[str, ...]:
    """The mode of each layer: ``choice``, else the mode in a split file, else dense. With predicted, layers
    without a predictor are gate-first. With thresholded, layers without thresholds are dense. A layer that
    keeps the source's down projection, because dense was found to be faster there, is dense in mode
    gate-first, too; so is a layer without zeros. Dense and gate-first have the same bits in every layer.
    Layers with experts are dense, or gate-first if that is requested and their neurons can be picked.

    Raises ModelError for a mode that the model does not allow.
    """
    layers = model.hyper.layers
    if choice is None:
        modes = model.split.modes if model.split else ("dense",) * layers
        for mode in sorted(set(modes)):
            _check_mode(model, mode)
        for index, mode in enumerate(modes):
            if mode in ("gate-first", "predicted") and not model.has_zeros(index):
                raise ModelError(f"{model.path}: layer {index} is {mode}, and its activation makes no zeros")
            if mode == "gate-first" and _routed(model, index) and not picks_in_experts(model):
                raise ModelError(f"{model.path}: layer {index} is {mode}, and its experts are computed whole")
        return modes
    _check_mode(model, choice)
    return tuple(_mode(model, index, choice) for index in range(layers))


def whole_experts(model: Model, modes: tuple[str, ...]) -> tuple[str, ...]:
    """``modes`` with all experts computed whole, which has the same bits."""
    return tuple("dense" if _routed(model, index) else mode for index, mode in enumerate(modes))


def _routed(model: Model, index: int) -> bool:
    return isinstance(model.layers[index].feeds, ExpertsFFN)


def _mode(model: Model, index: int, choice: str) -> str:
    """The mode of one layer when ``choice`` is requested."""
    if _routed(model, index):
        return "gate-first" if choice == "gate-first" and picks_in_experts(model) else "dense"
    layer = model.split.layer(index) if model.split else None
    if layer is None or choice == "dense":
        return "dense"
    if choice == "thresholded":
        return "thresholded" if layer.threshold else "dense"
    if choice == "predicted" and layer.predictor:
        return "predicted"
    return "gate-first" if layer.columns is None and model.has_zeros(index) else "dense"


def picks_in_experts(model: Model) -> bool:
    """Whether single neurons of experts can be left out, in every layer that has experts."""
    every = [layer.feeds for layer in model.layers if isinstance(layer.feeds, ExpertsFFN)]
    return (
        bool(every)
        and model.hyper.activation in RELU_FAMILY
        and all(Layout.PICKED_COLUMNS.possible(ffn.down.row_type, model.hyper.width) for ffn in every)
    )


def _check_mode(model: Model, choice: str) -> None:
    if choice not in MODES:
        raise ModelError(
            f"{model.path}: mode {choice!r} is not one that this version runs ({', '.join(MODES)})"
        )
    if choice == "dense":
        return
    if choice == "gate-first" and picks_in_experts(model):
        return
    if all(facts.ffn != "dense" for facts in model.hyper.facts):
        raise ModelError(
            f"{model.path}: these experts run in mode dense alone, which reads only those that a token "
            "takes; gate-first needs an activation with exact zeros, and down projections of a type from "
            "Q4_0 to Q8_0 or from Q4_K to Q6_K"
        )
    if choice == "thresholded":
        _check_thresholded(model)
        return
    if not model.exact_zeros:
        raise ModelError(
            f"{model.path}: {choice} skips neurons whose activation is exactly zero; "
            f"{model.hyper.activation} has no exact zeros, use --mode dense"
        )
    if model.split is None:
        raise ModelError(f"{model.path}: {choice} needs a split file; make one with powerinfer convert")
    if choice == "predicted" and not any(layer.predictor for layer in model.split.layers):
        raise ModelError(
            f"{model.path}: predicted needs predictors, and this file has none; use --mode gate-first"
        )


def _check_thresholded(model: Model) -> None:
    if model.exact_zeros:
        raise ModelError(
            f"{model.path}: thresholded is for activations without exact zeros; {model.hyper.activation} has "
            "them, use --mode gate-first, which is exact"
        )
    if model.split is None or model.split.header.thresholding is None:
        raise ModelError(
            f"{model.path}: thresholded needs a split file with thresholds; make them with powerinfer "
            "threshold on the source model, then powerinfer convert"
        )
