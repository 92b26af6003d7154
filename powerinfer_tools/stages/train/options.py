"""The options of train, and its results."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from powerinfer_formats.predictors import PredictorsHeader, RowTypeName
from powerinfer_formats.records import to_plain
from powerinfer_tools.stages.train.frontier import Frontier

#: How predictors can be made: of low rank, but for ``sign``, of the gate's signs. ``tuned`` needs torch.
METHODS = ("svd", "sign", "tuned")
#: Types that the engine multiplies with and that small errors survive.
ROW_TYPES: tuple[RowTypeName, ...] = get_args(RowTypeName)


@dataclass(frozen=True)
class TrainOptions:
    """What to make.

    ``budget`` is the most that all predictors may weigh, as a share of the model's bytes. With ``recall``,
    that share of active neurons is to be found in every layer; without, what is predicted is chosen layer
    by layer so that perplexity on ``text`` grows by no more than the share ``max_increase``. ``windows`` of
    the text are used, a third of them to choose with and the others to measure what came of it. ``device``
    and ``seed`` are for the method ``tuned``; ``restart`` forgets layers that interrupted work has tuned.
    """

    model: Path
    trace: Path
    output: Path
    method: str = "svd"
    recall: float | None = None
    max_increase: float = 0.001
    text: Path | None = None
    windows: int = 12
    budget: float = 0.1
    row_type: RowTypeName = "Q4_0"
    threads: int | None = None
    device: str = "cpu"
    seed: int = 0
    restart: bool = False


@dataclass(frozen=True)
class TrainReport:
    """What was written. The means are over layers, measured on records that were used for nothing else;
    ``frontier`` is what other thresholds of the same predictors would reach on those."""

    output: str
    header: PredictorsHeader
    model_bytes: int
    frontier: Frontier

    def mean(self, name: str) -> float:
        """Mean of one figure of :class:`~powerinfer_formats.predictors.Quality` over the layers."""
        return float(np.mean([getattr(layer.quality, name) for layer in self.header.layers]))

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        means = {name: self.mean(name) for name in vars(self.header.layers[0].quality)}
        return {
            "path": self.output,
            **to_plain(self.header),
            "mean": means,
            "bytes": self.header.nbytes,
            "share_of_model": self.header.nbytes / self.model_bytes,
            "frontier": self.frontier.as_dict(),
        }
