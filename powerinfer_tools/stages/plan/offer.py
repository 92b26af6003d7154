"""Which predictors a plan may use: those whose measured cost in quality is within what the user allows."""

from dataclasses import dataclass
from pathlib import Path

from powerinfer_formats.block_types import TensorType
from powerinfer_formats.predictors import PredictorInfo
from powerinfer_formats.predictors import Predictors as PredictorsFile
from powerinfer_tools.errors import PlanError
from powerinfer_tools.model.predictor_shapes import Predictors, PredictorShape, low_rank
from powerinfer_tools.model.shapes import ModelShape


@dataclass(frozen=True)
class Offer:
    """The predictor of each layer, None where it may not be used (empty: nowhere), and why, in words."""

    layers: Predictors
    note: str


def offer(path: Path, shape: ModelShape, max_ppl_increase: float) -> Offer:
    """What the predictors of ``path`` offer to a plan of ``shape`` that may raise its perplexity by the share
    ``max_ppl_increase``.

    Raises PlanError for a share that is none, FormatError for a file that holds no predictors, or another
    model's.
    """
    if shape.routed:
        raise PlanError(
            f"{path}: predictors name neurons of one FFN; {shape.name} has experts, which its router names"
        )
    if not 0 <= max_ppl_increase <= 1:
        raise PlanError(f"--max-ppl-increase {max_ppl_increase}: a share from 0 (exact modes only) up to 1")
    file = PredictorsFile.load(path)
    if shape.fingerprint is not None:
        sizes = (len(shape.layers), shape.width, shape.layers[0].neurons)
        file.require_model(shape.fingerprint, shape.name, sizes, path)
    layers = predictor_shapes(file)
    refusal = _refusal(file, layers, max_ppl_increase)
    if refusal:
        return Offer((), f"{path.name}: not used, {refusal}")
    cost = file.header.cost
    assert cost is not None
    used = sum(layer is not None for layer in layers)
    note = f"{path.name}: for {used} of {len(layers)} layers, measured to change the perplexity by "
    return Offer(layers, f"{note}{100 * cost.increase:+.2f} % over {cost.tokens:,} tokens")


def predictor_shapes(file: PredictorsFile) -> Predictors:
    """The predictors of ``file`` as the planner counts them, whatever they cost in quality."""
    return tuple(_shape_of(file, layer) for layer in file.header.layers)


def _refusal(file: PredictorsFile, layers: Predictors, allowed: float) -> str:
    """Why the predictors may not be used; empty: they may."""
    cost = file.header.cost
    if not any(layers):
        return "no layer has one"
    if not allowed:
        return "--max-ppl-increase is 0 (exact modes only)"
    if cost is None:
        return "what they cost in perplexity has not been measured"
    if cost.increase > allowed:
        return (
            f"they change the perplexity by {100 * cost.increase:+.2f} %, more than the {100 * allowed:g} % "
            "that --max-ppl-increase allows"
        )
    return ""


def _shape_of(file: PredictorsFile, layer: PredictorInfo) -> PredictorShape | None:
    """One layer's predictor as the planner counts it; one of a kind without rank has its bytes in equal parts
    for all neurons."""
    header, quality = file.header, layer.quality
    overshoot = quality.predicted_density / max(quality.density, 1e-9) if quality else 1.0
    if layer.kind == "none":
        return None
    if layer.rank:
        return low_rank(layer.rank, TensorType[header.row_type], header.width, overshoot)
    return PredictorShape(0, -(-layer.nbytes // header.neurons), 0, overshoot)
