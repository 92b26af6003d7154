"""What a student has learned, rounded to the rows that are written and to the small integers of a delta."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from powerinfer_formats.delta import Change, Passing
from powerinfer_kernels import dequantize
from powerinfer_tools.model.loading import Model
from powerinfer_tools.stages.relufy.application import changed
from powerinfer_tools.stages.relufy.error_passing import PASSING_TYPES, Doubles, passing_of, round_rows
from powerinfer_tools.stages.relufy.export import Bytes, FFNTypes, rescaled, source_matrix
from powerinfer_tools.stages.relufy.fitting import advance, fit, pieces
from powerinfer_tools.stages.relufy.network import Network, Tensor
from powerinfer_tools.stages.relufy.rounding import Floats, round_factors, round_matrix
from powerinfer_tools.stages.relufy.student import Student, TrainedMatrix, as_array


@dataclass(frozen=True)
class Rounded:
    """For every layer, by kind, the rows to write and the changes that make them."""

    rows: tuple[Mapping[str, Bytes], ...]
    changes: tuple[Mapping[str, Change], ...]
    passings: tuple[Passing, ...]


@torch.no_grad()
def round_student(
    network: Network, student: Student, tokens: Tensor, types: FFNTypes, finished: Callable[[], None]
) -> Rounded:
    """Round all that ``student`` has changed, layer by layer, and leave it with the rounded matrices.

    ``tokens`` (windows, positions) show what is read: errors of gate and up are passed on between columns
    that can make up for each other, and every layer's down projection is fitted once more, to what the
    rounded neurons and the rounded layers before have missed of the student's residual stream.
    ``finished`` is called after each layer, and may raise to stop.
    """
    exact = network.embed(tokens)
    own = exact.clone()
    rows, changes, passings = [], [], []
    for index in range(network.hyper.layers):
        ffn = student.ffn(index)
        read, target = advance(network, index, exact, own, lambda x, ffn=ffn: ffn.down(ffn.hidden(x)))  # type: ignore[misc]
        layer = _Layer(network.model, student, index, types)
        x = read.flatten(0, 1)
        if types.gate in PASSING_TYPES:
            layer.passing = passing_of(_second_moments(x))
        for kind in ("gate", "up"):
            layer.round(kind, x)
        hidden = torch.cat([ffn.hidden(read[piece]) for piece in pieces(read)])
        fit(ffn.down, hidden.flatten(0, 1), target.flatten(0, 1))
        layer.round("down", hidden.flatten(0, 1))
        for piece in pieces(own):
            own[piece] = network.add_ffn(index, own[piece], ffn.down(hidden[piece]))
        rows.append(layer.rows)
        changes.append(layer.changes)
        passings += [layer.passing] if layer.passing is not None else []
        finished()
    return Rounded(tuple(rows), tuple(changes), tuple(passings))


class _Layer:
    """One layer's matrices, as they are rounded one after the other."""

    def __init__(self, model: Model, student: Student, index: int, types: FFNTypes) -> None:
        self.model, self.student, self.index, self.types = model, student, index, types
        self.passing: Passing | None = None
        self.rows: dict[str, Bytes] = {}
        self.changes: dict[str, Change] = {}

    def round(self, kind: str, inputs: Tensor) -> None:
        """Round ``kind``, which reads ``inputs`` (tokens, columns), and make the student's matrix that."""
        matrix: TrainedMatrix = getattr(self.student.ffn(self.index), kind)
        source, scales = source_matrix(self.model, self.index, kind), self.student.scales(self.index)
        change = _rounded(matrix, rescaled(source, kind, scales), inputs)
        values = changed(source, kind, scales, change)
        row_type = self.types.of(kind)
        rows = round_rows(values, row_type, None if kind == "down" else self.passing)
        matrix.replace(dequantize(rows, row_type, *values.shape))
        self.rows[kind], self.changes[kind] = rows, change


def _rounded(matrix: TrainedMatrix, base: Doubles, inputs: Tensor) -> Change:
    if not matrix.rank:
        sizes: Floats = as_array(inputs.float().square().mean(dim=0).sqrt())
        return round_matrix((as_array(matrix.values) - base).astype(np.float32), sizes)
    return round_factors(as_array(matrix.outward), as_array(matrix.inward))


def _second_moments(x: Tensor) -> Doubles:
    rows = x.float()
    return as_array(rows.T @ rows).astype(np.float64) / len(rows)
