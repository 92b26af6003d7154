"""train: predictors for every layer, from the trace that profile took."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from powerinfer_formats.predictors import (
    LowRank,
    PredictorInfo,
    Predictors,
    PredictorsHeader,
    Quality,
    RowTypeName,
)
from powerinfer_formats.records import to_plain
from powerinfer_formats.trace import TraceFile
from powerinfer_kernels import RowType, block_shape, dequantize
from powerinfer_tools import __version__
from powerinfer_tools.errors import TrainError
from powerinfer_tools.model import DenseFFN, Model, load_model
from powerinfer_tools.progress import Progress, Silent
from powerinfer_tools.training.low_rank import Factors, factorize, judge, predictor
from powerinfer_tools.training.ranks import Candidate, choose

Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]
Records = tuple[Floats, Bools]
METHODS = ("svd",)
#: Types that the engine multiplies with and that small errors survive.
ROW_TYPES: tuple[RowTypeName, ...] = get_args(RowTypeName)
#: Fewest chunks that can be parted into learning, checking and testing.
MIN_CHUNKS = 10
#: Records that a rank is tried on: enough for three digits of its density.
_TRIED_RECORDS = 1024


@dataclass(frozen=True)
class TrainOptions:
    """What to make. ``budget`` is the most that all predictors may weigh, as a share of the model's bytes."""

    model: Path
    trace: Path
    output: Path
    method: str = "svd"
    recall: float = 0.95
    budget: float = 0.1
    row_type: RowTypeName = "Q8_0"


@dataclass(frozen=True)
class TrainReport:
    """What was written. The means are over layers, measured on records that were used for nothing else."""

    output: str
    header: PredictorsHeader
    model_bytes: int

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
        }


def run_train(options: TrainOptions, progress: Progress | None = None) -> TrainReport:
    """Make the predictors and write them.

    Records are parted by chunk: seven tenths to learn from, two to choose ranks and thresholds, one to
    measure. Raises TrainError, ModelError and FormatError (also for the trace of another model).
    """
    model = load_model(options.model)
    try:
        model.require_one_ffn(TrainError, "train")
        _check(options, model)
        with TraceFile(options.trace) as trace:
            trace.require_model(model.fingerprint, model.name, _shape(model))
            return _Run(options, model, trace, progress or Silent()).complete()
    finally:
        model.close()


def _check(options: TrainOptions, model: Model) -> None:
    if model.split is not None:
        raise TrainError(f"{options.model} is a split file; train on the source model that it was made from")
    if options.method not in METHODS or options.row_type not in ROW_TYPES:
        raise TrainError(
            f"method {options.method!r} and type {options.row_type!r}: known are {', '.join(METHODS)} and "
            f"{', '.join(ROW_TYPES)}"
        )
    if not 0 < options.recall < 1 or not 0 < options.budget <= 1:
        raise TrainError(f"recall {options.recall} and budget {options.budget} must lie between 0 and 1")
    block = block_shape(RowType[options.row_type])[0]
    if model.hyper.width % block:
        raise TrainError(
            f"{options.model}: rows of {model.hyper.width} values are no whole blocks of {options.row_type}; "
            "take --type F16"
        )


def _shape(model: Model) -> tuple[int, int, int]:
    return model.hyper.layers, model.hyper.width, model.hyper.neurons


def parted(chunks: int) -> tuple[list[int], list[int], list[int]]:
    """Chunks to learn from, to check with and to test on: of ten, seven, two and one."""
    places = np.arange(chunks) % 10
    groups = [np.flatnonzero((places >= low) & (places < high)) for low, high in ((0, 7), (7, 9), (9, 10))]
    return groups[0].tolist(), groups[1].tolist(), groups[2].tolist()


class _Run:
    """One run of train."""

    def __init__(self, options: TrainOptions, model: Model, trace: TraceFile, progress: Progress) -> None:
        self.options, self.model, self.trace, self.progress = options, model, trace, progress
        self.row_type = RowType[options.row_type]
        chunks = len(trace.header.chunks)
        if chunks < MIN_CHUNKS:
            raise TrainError(
                f"{trace.path} has {chunks} chunks of records, too few to learn from and to judge by; "
                "profile with a larger --trace (4096, say), or more text"
            )
        self.learn, self.check, self.test = parted(chunks)

    def complete(self) -> TrainReport:
        """Try ranks in every layer, choose one for each, and make the predictors."""
        layers = self.model.hyper.layers
        self.progress.start("trying ranks", layers, "layers")
        candidates = []
        for index in range(layers):
            candidates.append(self._candidates(index))
            self.progress.advance(1)
        self.progress.finish()
        chosen = choose(candidates, int(self.options.budget * self.model.gguf.nbytes))
        self.progress.start("making predictors", layers, "layers")
        made: list[tuple[LowRank, Quality]] = []
        for index, candidate in enumerate(chosen):
            gate, factors, learn, check = self._layer(index)
            layer = predictor(
                factors,
                candidate.rank,
                self.row_type,
                gate,
                learn,
                check,
                self.options.recall,
                self._added(index),
            )
            made.append((layer, judge(layer, *self._records(index, self.test))))
            self.progress.advance(1)
        self.progress.finish()
        header = self._header(chosen, [quality for _, quality in made])
        Predictors(header, tuple(layer for layer, _ in made)).save(self.options.output)
        return TrainReport(str(self.options.output), header, self.model.gguf.nbytes)

    def _candidates(self, index: int) -> list[Candidate]:
        gate, factors, learn, check = self._layer(index)
        some = check[0][:_TRIED_RECORDS], check[1][:_TRIED_RECORDS]
        ffn = self.model.layers[index].ffn
        assert isinstance(ffn, DenseFFN)
        rows = sum(weight.nbytes for weight in ffn.matrices)
        added, recall = self._added(index), self.options.recall
        found = []
        for rank in self._ranks():
            made = predictor(factors, rank, self.row_type, gate, learn, some, recall, added)
            quality = judge(made, *some)
            found.append(Candidate(rank, self._nbytes(rank), quality.predicted_density * rows))
        return found

    def _layer(self, index: int) -> tuple[Floats, Factors, Floats, Records]:
        ffn = self.model.layers[index].ffn
        assert isinstance(ffn, DenseFFN)
        weight = ffn.first
        gate = dequantize(weight.data, weight.row_type, weight.rows, weight.columns)
        learn, _ = self._records(index, self.learn)
        return gate, factorize(gate, learn), learn, self._records(index, self.check)

    def _added(self, index: int) -> Floats | None:
        """What is added to a gate's product before the sign says whether the neuron is active."""
        bias, cut = self.model.layers[index].ffn_bias, self.model.hyper.activation_cut
        if not cut:
            return bias
        return np.full(self.model.hyper.neurons, -cut, np.float32) + (0 if bias is None else bias)

    def _records(self, index: int, chunks: Sequence[int]) -> Records:
        inputs, active = self.trace.read(index, chunks)
        return inputs.astype(np.float32), active

    def _ranks(self) -> list[int]:
        """Whole blocks, up to half of the width: beyond, a predictor costs more than the gate saves."""
        block = max(block_shape(self.row_type)[0], 16)
        width = self.model.hyper.width
        steps = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
        return [block * step for step in steps if block * step <= max(block, width // 2)]

    def _nbytes(self, rank: int) -> int:
        values, nbytes = block_shape(self.row_type)
        hyper = self.model.hyper
        matrices = (rank * (hyper.width // values) + hyper.neurons * (rank // values)) * nbytes
        return matrices + 4 * hyper.neurons

    def _header(self, chosen: list[Candidate], quality: list[Quality]) -> PredictorsHeader:
        trace = self.trace.header
        layers = tuple(
            PredictorInfo("low-rank", candidate.rank, candidate.nbytes, reached)
            for candidate, reached in zip(chosen, quality, strict=True)
        )
        return PredictorsHeader(
            fingerprint=self.model.fingerprint,
            model_name=self.model.name,
            method=self.options.method,
            row_type=self.options.row_type,
            target_recall=self.options.recall,
            width=trace.width,
            neurons=trace.neurons,
            layers=layers,
            test_records=sum(trace.chunks[chunk] for chunk in self.test),
            cost=None,
            corpus_hashes=trace.corpus_hashes,
            tool_version=__version__,
        )
