"""What a student has learned, rounded to the small integers of a delta."""

import numpy as np
import numpy.typing as npt
import torch

from powerinfer_formats.delta import KINDS, Change
from powerinfer_tools.model.loading import Model
from powerinfer_tools.stages.relufy.export import rescaled, source_matrix
from powerinfer_tools.stages.relufy.network import Network, Tensor
from powerinfer_tools.stages.relufy.rounding import Floats, round_factors, round_matrix
from powerinfer_tools.stages.relufy.student import Student, TrainedMatrix, as_array


def round_changes(
    model: Model, network: Network, student: Student, tokens: Tensor
) -> tuple[dict[str, Change], ...]:
    """Round all that ``student`` has changed, and leave it with the rounded changes.

    ``tokens`` (windows, positions) show how large the inputs of every matrix are.
    """
    sizes = _input_sizes(network, student, tokens)
    changes = []
    for index in range(model.hyper.layers):
        layer = {}
        for kind in KINDS:
            matrix: TrainedMatrix = getattr(student.ffn(index), kind)
            base = rescaled(source_matrix(model, index, kind), kind, student.scales(index))
            size = sizes[index][1 if kind == "down" else 0]
            layer[kind] = _rounded(matrix, base, size)
        changes.append(layer)
    return tuple(changes)


def _rounded(matrix: TrainedMatrix, base: npt.NDArray[np.float64], input_rms: Floats) -> Change:
    if not matrix.rank:
        change = round_matrix((as_array(matrix.values) - base).astype(np.float32), input_rms)
        _assign(matrix.values, base + change.values())
        return change
    change = round_factors(as_array(matrix.outward), as_array(matrix.inward))
    assert change.inward is not None
    _assign(matrix.outward, change.outward.values())
    _assign(matrix.inward, change.inward.values().T)
    return change


def _assign(parameter: Tensor, values: np.ndarray) -> None:
    parameter.data.copy_(torch.from_numpy(np.ascontiguousarray(values, np.float32)))


@torch.no_grad()
def _input_sizes(network: Network, student: Student, tokens: Tensor) -> list[tuple[Floats, Floats]]:
    """For every layer the root mean squares of the inputs of gate and up, (width), and of down, (neurons)."""
    squares: list[list[tuple[Tensor, Tensor]]] = [[] for _ in student.ffns]

    def ffn(index: int, x: Tensor) -> Tensor:
        hidden = student.ffn(index).hidden(x)
        squares[index].append((_mean_square(x), _mean_square(hidden)))
        return student.ffn(index).down.forward(hidden)

    for window in tokens:
        network.hidden(window[None], ffn)
    return [(_root([x for x, _ in seen]), _root([hidden for _, hidden in seen])) for seen in squares]


def _root(squares: list[Tensor]) -> Floats:
    return as_array(torch.stack(squares).mean(dim=0).sqrt())


def _mean_square(x: Tensor) -> Tensor:
    return x.float().square().flatten(0, -2).mean(dim=0)
