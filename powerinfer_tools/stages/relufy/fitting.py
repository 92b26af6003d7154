"""The best down projections for new activations, in closed form: where distillation begins.

Layer by layer, from the first: the student's own neurons at work on the student's own inputs, and the change
of the down projection that brings its residual stream nearest to the dense model's (ridge regression), so
that what the layers before got wrong is mended as well.
"""

from collections.abc import Callable
from functools import partial

import torch

from powerinfer_tools.stages.relufy.cuts import neuron_scales
from powerinfer_tools.stages.relufy.network import Network, Tensor
from powerinfer_tools.stages.relufy.student import Student, TrainedMatrix

#: The penalty on the change, as a share of the mean square of the neurons' outputs.
RIDGE = 0.02
#: Windows that go through a layer at once: what bounds the memory of attention.
_PIECE = 4


def fit_down_projections(
    network: Network,
    student: Student,
    tokens: Tensor,
    done: int,
    finished: Callable[[int], None],
    density: float | None = None,
) -> None:
    """Fit the down projection of every layer from number ``done`` on to ``tokens`` (windows, positions);
    ``finished`` is called with the number of layers that are through, and may raise to stop.

    With ``density``, the neurons of each of these layers get thresholds of their own before (:mod:`.cuts`).
    """
    teacher = network.embed(tokens)
    own = teacher.clone()
    for index in range(network.hyper.layers):
        with torch.no_grad():
            read, target = advance(network, index, teacher, own, partial(network.dense_ffn, index))
            ffn = student.ffn(index)
            if index >= done and density is not None:
                ffn.rescale(neuron_scales(ffn, read.flatten(0, 1), density))
            hidden, down = torch.cat([ffn.hidden(read[piece]) for piece in pieces(read)]), ffn.down
            if index >= done:
                fit(down, hidden.flatten(0, 1), target.flatten(0, 1))
            for piece in pieces(own):
                own[piece] = network.add_ffn(index, own[piece], down.forward(hidden[piece]))
        finished(index + 1)


def pieces(x: Tensor) -> list[slice]:
    """A few windows of ``x`` at a time."""
    return [slice(first, first + _PIECE) for first in range(0, len(x), _PIECE)]


def advance(
    network: Network, index: int, teacher: Tensor, own: Tensor, teacher_ffn: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Take ``teacher`` through the layer, with ``teacher_ffn``, and ``own`` through its attention, in place.

    Returns what the student's FFN reads and what it should add (windows, positions, width): what is missing
    to the teacher's stream, or, where a norm follows the FFN, so that no sum of rows reaches that, what the
    teacher's FFN gives.
    """
    reads, targets = [], []
    for piece in pieces(teacher):
        read, teacher[piece] = network.through_attention(index, teacher[piece])
        out = teacher_ffn(read)
        teacher[piece] = network.add_ffn(index, teacher[piece], out)
        read, own[piece] = network.through_attention(index, own[piece])
        reads.append(read)
        targets.append(teacher[piece] - own[piece] if network.post_norms[index] is None else out.float())
    return torch.cat(reads), torch.cat(targets)


def fit(down: TrainedMatrix, hidden: Tensor, target: Tensor) -> None:
    """Move ``down`` to the least squares of ``target`` (tokens, width) by ``hidden`` (tokens, neurons)."""
    missing = target - down.forward(hidden).float()
    rows = hidden.float()
    gram = rows.T @ rows
    penalty = RIDGE * gram.diagonal().mean() + 1e-12
    regular = gram + penalty * torch.eye(len(gram), device=gram.device)
    down.values.add_(torch.linalg.solve(regular, rows.T @ missing).T)
