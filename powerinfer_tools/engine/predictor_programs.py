"""Predictors laid out for the kernels, by kind."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from powerinfer_formats.split_predictors import SplitLowRank, SplitPredictor
from powerinfer_kernels import (
    Activations,
    Matrix,
    Pool,
    ProgramBuilder,
    RowType,
    Signs,
    aligned,
    sign_code_words,
)
from powerinfer_tools.engine.buffers import Buffers, Floats, activations


class Predictor(Protocol):
    """Gives each neuron a score; neurons above their threshold are computed."""

    @property
    def threshold(self) -> Floats:
        """Thresholds (neurons), which may be written to between runs."""

    @property
    def nbytes(self) -> int:
        """Bytes that one token touches."""

    @property
    def quantized(self) -> bool:
        """Whether it reads the quantised input."""

    def prepare(self, builder: ProgramBuilder, buffers: Buffers) -> None:
        """Append the operations that read the FFN's normalised input, or the residual stream that its norm
        has read. In a parallel layer, attention follows."""

    def write(self, builder: ProgramBuilder, scores: Floats) -> None:
        """Append the operations that follow :meth:`prepare` and end in ``scores`` (T, neurons)."""


@dataclass(frozen=True)
class LowRankPredictor:
    """outward · a(inward · x). ``low`` (T, rank) is scratch for the input's short form, ``low_acts`` its
    quantised copy (None where ``outward`` is of a float type). ``residual``: x is the residual stream, not
    the normalised input; ``relu``: a sets negative values to 0."""

    inward: Matrix
    outward: Matrix
    threshold: Floats
    low: Floats
    low_acts: Activations | None
    residual: bool
    relu: bool

    @property
    def nbytes(self) -> int:
        """Bytes that one token touches."""
        return self.inward.nbytes + self.outward.nbytes + self.threshold.nbytes

    @property
    def quantized(self) -> bool:
        """Whether it reads the quantised input."""
        return not (self.residual or self.inward.row_type.is_float)

    def prepare(self, builder: ProgramBuilder, buffers: Buffers) -> None:
        """Append the short form."""
        source, acts = buffers.normed, buffers.normed_acts
        if self.residual:
            source, acts = buffers.x, buffers.residual_acts
            if acts is not None and not self.inward.row_type.is_float:
                builder.quantize(source, acts)
        builder.matmul(self.inward, source, acts, self.low)
        if self.relu:
            builder.activate(self.low, None, self.low, "relu")
        if self.low_acts is not None:
            builder.quantize(self.low, self.low_acts)

    def write(self, builder: ProgramBuilder, scores: Floats) -> None:
        """Append the scores."""
        builder.matmul(self.outward, self.low, self.low_acts, scores)


@dataclass(frozen=True)
class SignPredictor:
    """Signs of the gate's weights against the input's code; ``code`` (T, words) is scratch."""

    signs: Signs
    threshold: Floats
    code: npt.NDArray[np.uint32]
    quantized: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes that one token touches."""
        return self.signs.nbytes + self.threshold.nbytes

    def prepare(self, builder: ProgramBuilder, buffers: Buffers) -> None:
        """Append the input's code."""
        builder.sign_code(buffers.normed, self.code)

    def write(self, builder: ProgramBuilder, scores: Floats) -> None:
        """Append the scores."""
        builder.sign_scores(self.signs, self.code, scores)


@dataclass(frozen=True)
class NamedElsewhere:
    """The hot device predicts: its scores are 1 and 0, and are already in the buffer."""

    threshold: Floats
    nbytes: int = 0
    quantized: bool = False

    def prepare(self, builder: ProgramBuilder, buffers: Buffers) -> None:
        """Append nothing."""

    def write(self, builder: ProgramBuilder, scores: Floats) -> None:
        """Append nothing."""


def named_elsewhere(neurons: int) -> NamedElsewhere:
    """The hot device's predictor as seen by the host, for ``neurons`` cold neurons."""
    return NamedElsewhere(np.zeros(neurons, np.float32))


def lay_out(predictor: SplitPredictor, pool: Pool, first: int, width: int, tokens: int) -> Predictor:
    """``predictor`` for the neurons from position ``first`` on and up to ``tokens`` inputs (width) at a
    time."""
    threshold = predictor.threshold[first:].copy()
    if not isinstance(predictor, SplitLowRank):
        signs = np.ascontiguousarray(predictor.signs[first:])
        code = aligned((tokens, sign_code_words(width)), np.uint32)
        return SignPredictor(Signs(signs, len(signs), width), threshold, code)
    rank, (inward, outward) = predictor.rank, map(RowType, predictor.types)
    rows = np.ascontiguousarray(predictor.outward[first:])
    return LowRankPredictor(
        inward=Matrix.pack(pool, predictor.inward.reshape(-1), inward, rank, width),
        outward=Matrix.pack(pool, rows.reshape(-1), outward, len(rows), rank),
        threshold=threshold,
        low=aligned((tokens, rank), np.float32),
        low_acts=None if outward.is_float else activations(tokens, rank),
        residual=predictor.residual,
        relu=predictor.relu,
    )
