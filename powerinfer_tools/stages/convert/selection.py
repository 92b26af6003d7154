"""What a split file can select neurons by: predictors and thresholds, brought into its order of neurons."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from powerinfer_formats.plan import Plan
from powerinfer_formats.predictors import Predictors
from powerinfer_formats.split_layout import SplitPrediction
from powerinfer_formats.split_predictors import SplitLowRank, SplitPredictor
from powerinfer_formats.split_thresholds import SplitThresholding
from powerinfer_formats.thresholds import Thresholds
from powerinfer_tools.errors import ConvertError
from powerinfer_tools.model.loading import Model
from powerinfer_tools.model.predictor_scores import split_prediction, split_predictor

Order = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Selection:
    """The files of ``model``, None where they were not asked for; a model of the original PowerInfer has
    predictors of its own."""

    model: Model
    predictors: Predictors | None
    thresholds: Thresholds | None

    @classmethod
    def open(cls, model: Model, predictors: Path | None, thresholds: Path | None) -> Self:
        """Read the files. Raises FormatError, also for those of another model."""
        hyper, made, chosen = model.hyper, None, None
        if predictors is not None:
            made = Predictors.load(predictors)
            shape = (hyper.layers, hyper.width, hyper.neurons)
            made.require_model(model.fingerprint, model.name, shape, predictors)
        if thresholds is not None:
            chosen = Thresholds.load(thresholds)
            chosen.require_model(model.fingerprint, model.name, hyper.layers, hyper.neurons, thresholds)
        return cls(model, made, chosen)

    def require_for(self, plan: Plan, file: Path) -> None:
        """Raise ConvertError where a mode of ``plan``, which ``file`` holds, has nothing to select by: before
        hours of writing, not after them."""
        files = {
            "predicted": ("predictors", self.predictors.layers if self.predictors else self._own),
            "thresholded": ("thresholds", self.thresholds.layers if self.thresholds else ()),
        }
        for layer in plan.layers:
            name, layers = files.get(layer.mode, ("", ()))
            if name and (not layers or layers[layer.index] is None):
                raise ConvertError(
                    f"{file} computes layer {layer.index} in mode {layer.mode}, and no {name} are given for "
                    f"it; give those that it was planned with (--{name} FILE), or plan again without"
                )

    def prediction(self) -> SplitPrediction | None:
        """What the header of the split file says of predictors."""
        if self.predictors is not None:
            return split_prediction(self.predictors.header)
        kinds = tuple(made.kind for made in self._own if made)
        return SplitPrediction(kinds, (), ()) if self._own else None

    def predictor(self, index: int, order: Order) -> SplitPredictor | None:
        """The predictor of one layer, neurons in the given order."""
        if self.predictors is not None:
            return split_predictor(self.predictors.layers[index], self.predictors.header.row_type, order)
        own = self._own[index] if self._own else None
        if own is None:
            return None
        assert isinstance(own, SplitLowRank), "models of the original have no other kind"
        return replace(own, outward=own.outward[order], threshold=own.threshold[order])

    def thresholding(self) -> SplitThresholding | None:
        """What the header of the split file says of thresholds."""
        if self.thresholds is None:
            return None
        header, cost = self.thresholds.header, self.thresholds.header.cost
        figures = (cost.dense_perplexity, cost.perplexity, cost.ratio_error, cost.kl, header.max_increase)
        return SplitThresholding(header.factors, figures)

    def threshold(self, index: int) -> npt.NDArray[np.float32] | None:
        """The thresholds of one layer, neurons in the model's order."""
        return self.thresholds.layers[index] if self.thresholds else None

    @property
    def _own(self) -> tuple[SplitPredictor | None, ...]:
        return tuple(layer.predictor for layer in self.model.split.layers) if self.model.split else ()
