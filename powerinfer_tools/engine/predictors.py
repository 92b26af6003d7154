"""Predictors laid out for the kernels, by kind."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from powerinfer_formats.split_predictors import SplitPredictor
from powerinfer_kernels import Activations, Matrix, Pool, ProgramBuilder, RowType, aligned
from powerinfer_tools.engine.buffers import Floats, activations


class Predictor(Protocol):
    """Says of each neuron a score; those above their threshold are computed."""

    @property
    def threshold(self) -> Floats:
        """Thresholds (neurons), which may be written to between runs."""

    @property
    def nbytes(self) -> int:
        """Bytes that one token touches."""

    @property
    def quantized(self) -> bool:
        """Whether it reads the quantised input."""

    def write(
        self, builder: ProgramBuilder, normed: Floats, acts: Activations | None, scores: Floats
    ) -> None:
        """Append the operations from the normalised input (T, width) to ``scores`` (T, neurons)."""


@dataclass(frozen=True)
class LowRankPredictor:
    """outward · (inward · x). ``low`` (T, rank) is scratch for the input's short form, ``low_acts`` its
    quantised copy (None where ``outward`` is of a float type)."""

    inward: Matrix
    outward: Matrix
    threshold: Floats
    low: Floats
    low_acts: Activations | None

    @property
    def nbytes(self) -> int:
        """Bytes that one token touches."""
        return self.inward.nbytes + self.outward.nbytes + self.threshold.nbytes

    @property
    def quantized(self) -> bool:
        """Whether it reads the quantised input."""
        return not self.inward.row_type.is_float

    def write(
        self, builder: ProgramBuilder, normed: Floats, acts: Activations | None, scores: Floats
    ) -> None:
        """Append the operations."""
        builder.matmul(self.inward, normed, acts, self.low)
        if self.low_acts is not None:
            builder.quantize(self.low, self.low_acts)
        builder.matmul(self.outward, self.low, self.low_acts, scores)


def lay_out(predictor: SplitPredictor, pool: Pool, first: int, width: int, tokens: int) -> Predictor:
    """``predictor`` for the neurons from position ``first`` on and up to ``tokens`` inputs (width) at a
    time."""
    threshold = predictor.threshold[first:].copy()
    rank, (inward, outward) = predictor.rank, map(RowType, predictor.types)
    rows = np.ascontiguousarray(predictor.outward[first:])
    return LowRankPredictor(
        inward=Matrix.pack(pool, predictor.inward.reshape(-1), inward, rank, width),
        outward=Matrix.pack(pool, rows.reshape(-1), outward, len(rows), rank),
        threshold=threshold,
        low=aligned((tokens, rank), np.float32),
        low_acts=None if outward.is_float else activations(tokens, rank),
    )
