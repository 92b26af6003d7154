"""Scores of predictors in numpy, and how predictors of ``train`` become those of a split file."""

import numpy as np
import numpy.typing as npt

from powerinfer_formats.block_types import TensorType
from powerinfer_formats.predictors import (
    LayerPredictor,
    LowRank,
    PredictionCost,
    PredictorsHeader,
    ResidualRelu,
    SignBits,
)
from powerinfer_formats.split_layout import SplitPrediction
from powerinfer_formats.split_predictors import SplitLowRank, SplitPredictor, SplitResidualRelu, SplitSigns
from powerinfer_kernels import RowType, quantize, reference

Floats = npt.NDArray[np.float32]
#: What becomes of each kind in a split file.
_SPLIT: dict[type[LowRank], type[SplitLowRank]] = {LowRank: SplitLowRank, ResidualRelu: SplitResidualRelu}


def scores(made: LowRank | SignBits, inputs: Floats) -> Floats:
    """What ``made`` says of every neuron, (t, neurons), for normalised FFN inputs (t, width); float32."""
    if isinstance(made, LowRank):
        return np.asarray(inputs @ made.inward.T @ made.outward.T, np.float32)
    negative = np.unpackbits(made.signs, axis=1, count=inputs.shape[1], bitorder="little")
    signs = np.float32(1) - 2 * negative.astype(np.float32)
    codes, step = reference.sign_code(inputs.astype(np.float64))
    return np.asarray((codes.astype(np.float32) @ signs.T) * step.astype(np.float32), np.float32)


def split_predictor(
    made: LayerPredictor, row_type: str, order: npt.NDArray[np.int32]
) -> SplitPredictor | None:
    """``made`` with its matrices rounded to ``row_type`` and its neurons in the given order."""
    if made is None:
        return None
    threshold = np.ascontiguousarray(made.threshold[order])
    if isinstance(made, SignBits):
        return SplitSigns(np.ascontiguousarray(made.signs[order]), threshold)
    kind, stored = RowType[row_type], TensorType[row_type]
    return _SPLIT[type(made)](
        rank=len(made.inward),
        types=(stored, stored),
        inward=quantize(np.ascontiguousarray(made.inward), kind),
        outward=quantize(np.ascontiguousarray(made.outward[order]), kind),
        threshold=threshold,
    )


def split_prediction(header: PredictorsHeader) -> SplitPrediction:
    """What a split file with these predictors says of them."""
    return SplitPrediction(
        kinds=tuple(layer.kind for layer in header.layers),
        recall=tuple(layer.quality.recall for layer in header.layers if layer.quality),
        density=tuple(layer.quality.predicted_density for layer in header.layers if layer.quality),
        cost=None if header.cost is None else _cost(header.cost),
    )


def _cost(cost: PredictionCost) -> tuple[float, float, float, float]:
    allowed = cost.max_increase or 0.0
    return cost.perplexity, cost.predicted_perplexity, cost.divergence, allowed
