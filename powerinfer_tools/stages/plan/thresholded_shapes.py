"""Thresholds as the planner sees them, and which of them a plan may use."""

from dataclasses import dataclass
from pathlib import Path

from powerinfer_formats.block_types import TensorType
from powerinfer_formats.thresholds import Thresholds as ThresholdsFile
from powerinfer_kernels import packed_row_bytes
from powerinfer_tools.errors import PlanError
from powerinfer_tools.model.shapes import ModelShape, NeuronBytes


@dataclass(frozen=True)
class ThresholdShape:
    """Mode thresholded in one layer: the rows of ``factor``, 0 gate or 1 up, are read for all neurons, the
    others for a share ``density`` of them, alike for hot and cold ones. The threshold itself, four bytes a
    neuron, does not count."""

    factor: int
    density: float

    def always_bytes(self, sizes: NeuronBytes, width: int) -> int:
        """Bytes of a neuron that are read for every token."""
        return packed_row_bytes(TensorType[sizes.types[self.factor]], width)


Thresholds = tuple[ThresholdShape | None, ...]


@dataclass(frozen=True)
class ThresholdOffer:
    """The thresholds of each layer, None where it stays dense (empty: nowhere), and why, in words."""

    layers: Thresholds
    note: str


def offer_thresholds(path: Path, shape: ModelShape, max_ppl_increase: float) -> ThresholdOffer:
    """What the thresholds of ``path`` offer to a plan of ``shape`` that may raise its perplexity by the share
    ``max_ppl_increase``: all of them, or none, since what they cost was measured together.

    Raises PlanError for a shape without a model, FormatError for a file that holds no thresholds, or another
    model's.
    """
    if shape.fingerprint is None:
        raise PlanError("thresholds belong to one model; a shape has none")
    file = ThresholdsFile.load(path)
    file.require_model(shape.fingerprint, shape.name, len(shape.layers), shape.layers[0].neurons, path)
    layers = tuple(
        None if factor == "none" else ThresholdShape(("gate", "up").index(factor), density)
        for factor, density in zip(file.header.factors, file.header.densities, strict=True)
    )
    cost = file.header.cost
    increase = cost.perplexity / cost.dense_perplexity - 1
    measured = f"measured to change the perplexity by {100 * increase:+.2f} % over {cost.tokens:,} tokens"
    used = sum(layer is not None for layer in layers)
    if not used:
        return ThresholdOffer((), f"{path.name}: not used, every layer is dense in it")
    if not max_ppl_increase:
        return ThresholdOffer((), f"{path.name}: not used, --max-ppl-increase is 0 (exact modes only)")
    if increase > max_ppl_increase:
        allowed = f"more than the {100 * max_ppl_increase:g} % that --max-ppl-increase allows"
        return ThresholdOffer((), f"{path.name}: not used, {measured}, {allowed}")
    return ThresholdOffer(layers, f"{path.name}: for {used} of {len(layers)} layers, {measured}")
