"""What verifying needs to know of neurons: splits by the share of them, and a curve of their FFN."""

from collections.abc import Sequence

import numpy as np

from powerinfer_formats.predictors import Predictors
from powerinfer_formats.profile import Profile
from powerinfer_kernels import RowType
from powerinfer_tools.detect import torch_version
from powerinfer_tools.measure.random_ffns import FFNShape
from powerinfer_tools.model.loading import Model
from powerinfer_tools.model.shapes import neuron_bytes, shape_of_model
from powerinfer_tools.stages.plan.costs import Machine
from powerinfer_tools.stages.plan.ffn_levels import FFN, mode_seconds
from powerinfer_tools.stages.plan.frequencies import model_frequencies
from powerinfer_tools.stages.plan.offer import predictor_shapes
from powerinfer_tools.stages.plan.verification_rows import (
    ANY_TOKENS,
    ENOUGH_BYTES,
    NO_TORCH,
    Parts,
    VerifyRow,
)

#: Hot shares of the rows, and of the two splits that the torch CPU device is measured with.
HOT_SHARES = (0.25, 0.5, 0.75)
_CALIBRATION = (0.125, 0.875)
#: Neurons that are placed together here.
GROUP = 32


class VerifiedNeurons:
    """Neurons in groups; time does not depend on which tokens come."""

    tokens = ANY_TOKENS
    #: Passes of a curve in each round.
    passes = 1

    def __init__(self, model: Model, profile: Profile, predictors: Predictors | None) -> None:
        self.shape = shape_of_model(model)
        layers = self.shape.layers
        self.sizes = [neuron_bytes(layer) for layer in layers]
        self.count = layers[0].neurons
        known = model_frequencies(self.shape, profile).layers
        assert known is not None  # there is a profile
        shapes = predictor_shapes(predictors) if predictors else (None,) * len(layers)
        self.ffns = [
            FFN(layer, size, frequencies, self.shape.exact_zeros, shape)
            for layer, size, frequencies, shape in zip(layers, self.sizes, known, shapes, strict=True)
        ]
        #: Dense, and where there are exact zeros those that leave them out.
        self.modes = ["dense"]
        if self.shape.exact_zeros:
            self.modes += ["gate-first", *(["predicted"] if all(shapes) else [])]

    def shares(self) -> list[float]:
        """Those of the splits with a hot side: none without torch."""
        first, last = _CALIBRATION
        return [] if torch_version() is None else [first, *HOT_SHARES, last]

    def hot(self, share: float) -> int:
        """Hot neurons of a layer: whole groups, at least one."""
        return max(GROUP, int(self.count * share) // GROUP * GROUP) if share else 0

    def measured(self) -> list[tuple[FFNShape, int]]:
        """The FFN whose curve is measured, in as many copies as the model has, or as no cache holds."""
        types, nbytes = tuple(RowType[name] for name in self.sizes[0].types), self.count * self.sizes[0].total
        layers = min(len(self.ffns), max(2, -(-ENOUGH_BYTES // nbytes)))
        return [(FFNShape(self.shape.width, self.count, types), layers)]

    def parts(self, mode: str, hot: int, machine: Machine) -> Parts:
        """The hot side's work counts in neurons."""
        layers = len(self.ffns)
        cold = sum(float(mode_seconds(ffn, mode, np.array([hot]), machine)[0]) for ffn in self.ffns)
        return Parts(layers * hot, layers if hot else 0, cold)

    def choices(self, hot: int) -> tuple[None, None]:
        """Neurons are not chosen."""
        return None, None

    def notes(self, rows: Sequence[VerifyRow], *, calibrated: bool) -> tuple[str, ...]:
        """What is left out."""
        return () if calibrated else (NO_TORCH,)
