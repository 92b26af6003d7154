"""Where the predictors of an exported model come from, and in which form they are written."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np

from powerinfer_formats.predictors import LowRank, Predictors, Quality, ResidualRelu
from powerinfer_formats.trace import TraceFile
from powerinfer_kernels import RowType
from powerinfer_tools.errors import ConvertError
from powerinfer_tools.model.loading import Model
from powerinfer_tools.stages.original import refit
from powerinfer_tools.stages.original.refit import Floats
from powerinfer_tools.stages.train.layer_data import parted
from powerinfer_tools.stages.train.low_rank import as_stored
from powerinfer_tools.stages.train.naming import judge as judge_ours


class PredictorSource(Protocol):
    """fc1 and fc2 of every layer, to be stored as ``row_type`` and compared with ``threshold``."""

    name: str
    threshold: float
    row_type: RowType
    #: Of each layer written so far, before and after; empty where nothing is measured.
    source_quality: list[Quality]
    quality: list[Quality]

    def rank(self, layer: int) -> int:
        """Hidden units of a layer."""

    def matrices(self, layer: int) -> tuple[Floats, Floats]:
        """(rank, width) and (neurons, rank)."""


@contextmanager
def open_source_of_predictors(
    model: Model, predictors: Path | None, trace: Path | None
) -> Iterator[PredictorSource]:
    """The predictors in the file ``predictors``, brought into the original's form with the help of ``trace``
    where they have another; without a file, such that name every neuron.

    Raises ConvertError and FormatError.
    """
    if predictors is None:
        yield _AllActive(model)
        return
    loaded = Predictors.load(predictors)
    shape = (model.hyper.layers, model.hyper.width, model.hyper.neurons)
    loaded.require_model(model.fingerprint, model.name, shape, predictors)
    kinds = {layer.kind for layer in loaded.header.layers}
    if kinds == {ResidualRelu.kind}:
        yield _AsTheyAre(loaded, predictors)
        return
    if kinds != {LowRank.kind}:
        raise ConvertError(
            f"{predictors}: layers have predictors of kind {', '.join(sorted(kinds))}; for the original "
            f"PowerInfer all must be of kind {LowRank.kind}, or all of kind {ResidualRelu.kind}"
        )
    if trace is None:
        raise ConvertError(
            f"{predictors} reads normalised inputs; the original PowerInfer reads the residual stream, and "
            f"to write it so needs a trace: powerinfer profile -m {model.path} --corpus FILE --trace 4096"
        )
    with TraceFile(trace) as records:
        records.require_model(model.fingerprint, model.name, shape)
        yield _Refitted(model, loaded, records)


class _AllActive:
    """One block of zeros: every score is 0, which is not below the threshold 0. Exact, and of no use."""

    name = "every neuron is computed"
    threshold = 0.0
    row_type = RowType.F16

    def __init__(self, model: Model) -> None:
        self.width, self.neurons = model.hyper.width, model.hyper.neurons
        self.source_quality: list[Quality] = []
        self.quality: list[Quality] = []

    def rank(self, layer: int) -> int:
        return refit.BLOCK

    def matrices(self, layer: int) -> tuple[Floats, Floats]:
        return np.zeros((refit.BLOCK, self.width), np.float32), np.zeros(
            (self.neurons, refit.BLOCK), np.float32
        )


class _AsTheyAre:
    """Predictors of the original's own form: imported from a folder, for one."""

    name = "as imported"

    def __init__(self, predictors: Predictors, path: Path) -> None:
        self.layers = [layer for layer in predictors.layers if isinstance(layer, LowRank)]
        self.row_type = RowType[predictors.header.row_type]
        self.source_quality: list[Quality] = []
        self.quality: list[Quality] = []
        bounds = {float(bound) for layer in self.layers for bound in np.unique(layer.threshold)}
        if len(bounds) != 1:
            raise ConvertError(
                f"{path}: the original PowerInfer has one threshold for all neurons; these differ"
            )
        # Ours compare with >, the original with ≥.
        self.threshold = float(np.nextafter(np.float32(bounds.pop()), np.float32(np.inf)))

    def rank(self, layer: int) -> int:
        return len(self.layers[layer].inward)

    def matrices(self, layer: int) -> tuple[Floats, Floats]:
        return self.layers[layer].inward, self.layers[layer].outward


class _Refitted:
    """Our predictors in the other form, measured on the records of a trace that nothing was learnt from."""

    name = "refitted to the residual stream"
    threshold = 0.0
    row_type = RowType.F16

    def __init__(self, model: Model, predictors: Predictors, trace: TraceFile) -> None:
        self.model, self.trace = model, trace
        self.layers = [layer for layer in predictors.layers if isinstance(layer, LowRank)]
        parts = parted(len(trace.header.chunks))
        self.learn, self.test = parts.learn, parts.test
        if not self.test:
            raise ConvertError(
                f"{trace.path} is too short to learn from and to judge by; take a larger --trace"
            )
        self.source_quality: list[Quality] = []
        self.quality: list[Quality] = []

    def rank(self, layer: int) -> int:
        return refit.units(len(self.layers[layer].inward))

    def matrices(self, layer: int) -> tuple[Floats, Floats]:
        source, norm = self.layers[layer], self.model.layers[layer].ffn_norm
        assert norm is not None, "every family of the original has norms before its FFNs"
        learn, _ = self.trace.read(layer, self.learn)
        made = refit.refit(source, norm, learn.astype(np.float32))
        made = refit.OriginalPredictor(*(as_stored(rows, self.row_type) for rows in vars(made).values()))
        inputs, active = self.trace.read(layer, self.test)
        self.source_quality.append(judge_ours(source, inputs.astype(np.float32), active))
        self.quality.append(refit.judge(made, norm, inputs.astype(np.float32), active))
        return made.inward, made.outward
