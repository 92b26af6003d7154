"""Which predictors a plan may use: those whose measured cost in quality is within what the user allows."""

from dataclasses import dataclass
from pathlib import Path

from powerinfer_formats.block_types import TensorType
from powerinfer_formats.predictors import Predictors as PredictorsFile
from powerinfer_tools.errors import PlanError
from powerinfer_tools.planning.predictors import Predictors, low_rank
from powerinfer_tools.planning.shapes import ModelShape


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
    if not 0 <= max_ppl_increase < 1:
        raise PlanError(f"--max-ppl-increase {max_ppl_increase}: a share from 0 (exact modes only) up to 1")
    file = PredictorsFile.load(path)
    if shape.fingerprint is not None:
        sizes = (len(shape.layers), shape.width, shape.layers[0].neurons)
        file.require_model(shape.fingerprint, shape.name, sizes, path)
    if not max_ppl_increase:
        return Offer((), f"{path.name}: not used, --max-ppl-increase is 0 (exact modes only)")
    return Offer((), f"{path.name}: not used, what they cost in perplexity has not been measured")


def predictor_shapes(file: PredictorsFile) -> Predictors:
    """The predictors of ``file`` as the planner counts them."""
    header = file.header
    row_type = TensorType[header.row_type]
    return tuple(
        low_rank(rank, row_type, header.width, quality.predicted_density / max(quality.density, 1e-9))
        for rank, quality in zip(header.ranks, header.quality, strict=True)
    )
