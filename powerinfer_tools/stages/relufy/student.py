"""The FFNs that are trained, and the sparsity they are pressed towards."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from powerinfer_formats.delta import Change, Delta
from powerinfer_tools.stages.relufy.export import rescaled
from powerinfer_tools.stages.relufy.network import Network, Tensor, activate

Floats = npt.NDArray[np.float32]


def as_array(tensor: Tensor) -> Floats:
    """The values of a parameter, wherever it is."""
    array: Floats = tensor.detach().cpu().numpy()
    return array


def _tensor(values: npt.NDArray[np.floating], like: Tensor) -> Tensor:
    return torch.from_numpy(values.astype(np.float32)).to(like.device)


class TrainedMatrix(nn.Module):
    """A matrix (rows, columns) and its change: of low rank, ``base`` + outward · inward, or free (rank 0).

    Low-rank changes begin at zero (LoRA, arXiv 2106.09685).
    """

    base: Tensor

    def __init__(self, base: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        rows, columns = base.shape
        self.rank = rank
        if rank:
            self.register_buffer("base", base, persistent=False)
            start = torch.randn(rank, columns, generator=generator) / math.sqrt(columns)
            self.inward = nn.Parameter(start.to(base.device))
            self.outward = nn.Parameter(torch.zeros(rows, rank, device=base.device))
        else:
            self.values = nn.Parameter(base.float().clone())

    def forward(self, x: Tensor) -> Tensor:
        """x (tokens, columns) times the transpose: (tokens, rows)."""
        if not self.rank:
            return functional.linear(x, self.values.to(x.dtype))
        change = functional.linear(functional.linear(x, self.inward.to(x.dtype)), self.outward.to(x.dtype))
        return functional.linear(x, self.base) + change

    @torch.no_grad()
    def take(self, change: Change) -> None:
        """Change by this instead; a free matrix, by this as well."""
        if change.inward is None:
            self.values.add_(_tensor(change.values(), self.values))
            return
        self.outward.copy_(_tensor(change.outward.values(), self.outward))
        self.inward.copy_(_tensor(change.inward.values().T, self.inward))

    @torch.no_grad()
    def scale_rows(self, factors: Tensor) -> None:
        """Multiply each row by its factor (rows), what the change began from and the change alike."""
        if not self.rank:
            self.values.mul_(factors[:, None])
            return
        self.base = (self.base.float() * factors[:, None]).to(self.base.dtype)
        self.outward.mul_(factors[:, None])

    @torch.no_grad()
    def replace(self, values: Floats) -> None:
        """Become ``values`` (rows, columns), without a change."""
        made = torch.from_numpy(np.ascontiguousarray(values, np.float32))
        if not self.rank:
            self.values.copy_(made)
            return
        self.base = made.to(self.base.device, self.base.dtype)
        self.outward.zero_()

    def merged(self, base: npt.NDArray[np.float64]) -> Floats:
        """The matrix as it is now; ``base`` is the unrounded start of a low-rank change."""
        if not self.rank:
            return as_array(self.values)
        return (base + as_array(self.outward) @ as_array(self.inward)).astype(np.float32)


class StudentFFN(nn.Module):
    """One layer's FFN with an activation of the ReLU family.

    ``rank`` is that of the changes of gate and up. The down projection is free: what its fit
    (:mod:`.fitting`) changes has no low rank. ``scale`` (neurons) is what rows of gate were multiplied by and
    rows of up divided by, so that one cut is a threshold of each neuron's own (:mod:`.cuts`).
    """

    scale: Tensor

    def __init__(
        self,
        base: tuple[Tensor, Tensor, Tensor],
        activation: tuple[str, float],
        rank: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.activation, self.cut = activation
        gate, up, down = base
        self.gate, self.up = (TrainedMatrix(matrix, rank, generator) for matrix in (gate, up))
        self.down = TrainedMatrix(down, 0, generator)
        self.register_buffer("scale", torch.ones(len(gate), device=gate.device))

    def rescale(self, factors: Tensor) -> None:
        """Multiply rows of gate by ``factors`` (neurons), and divide rows of up by them."""
        self.gate.scale_rows(factors)
        self.up.scale_rows(1 / factors)
        self.scale.mul_(factors)

    def restore_scale(self, base: tuple[Tensor, Tensor, Tensor]) -> None:
        """After a saved state was loaded: low-rank changes start from the rescaled ``base`` again."""
        for matrix, source, factors in zip(
            (self.gate, self.up), base[:2], (self.scale, 1 / self.scale), strict=True
        ):
            if matrix.rank:
                matrix.base = (source.float() * factors[:, None]).to(source.dtype)

    def hidden(self, x: Tensor) -> Tensor:
        """The neurons' outputs, before the down projection."""
        return activate(self.activation, self.gate(x), self.up(x), self.cut)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the FFN adds; the share of active neurons; the pressure, a mean of what would have to go.

        The pressure is the mean positive gate over its root mean square, so that it cannot be satisfied by
        scaling gate down and up up.
        """
        gate, up = self.gate(x), self.up(x)
        hidden = activate(self.activation, gate, up, self.cut)
        pressed = gate if self.activation != "drelu" else torch.minimum(gate, up)
        positive = functional.relu(pressed.float())
        scale = gate.detach().float().square().mean().sqrt() + 1e-12
        density = (hidden.detach() != 0).float().mean()
        return self.down(hidden), density, positive.mean() / scale


class Student:
    """The trained FFNs of a network, and what they showed during the last pass."""

    def __init__(self, network: Network, activation: str, rank: int, seed: int, cut: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.ffns = nn.ModuleList(
            StudentFFN(base, (activation, cut), rank, generator) for base in network.gated_base
        )
        self.begin()

    def begin(self) -> None:
        """Forget the last pass."""
        self.densities: list[Tensor] = []
        self.pressures: list[Tensor] = []

    def ffn(self, index: int) -> StudentFFN:
        """The FFN of layer ``index``."""
        ffn = self.ffns[index]
        assert isinstance(ffn, StudentFFN)
        return ffn

    def __call__(self, index: int, x: Tensor) -> Tensor:
        """Layer ``index``'s FFN, as :data:`~powerinfer_tools.stages.relufy.network.FFN`."""
        out, density, pressure = self.ffns[index](x)
        self.densities.append(density)
        self.pressures.append(pressure)
        result: Tensor = out
        return result

    def matrix(self, index: int, kind: str, base: Floats) -> Floats:
        """``kind`` ("gate", "up" or "down") of layer ``index`` as it is now; ``base`` is the source's."""
        trained: TrainedMatrix = getattr(self.ffn(index), kind)
        return trained.merged(rescaled(base, kind, self.scales(index)))

    def start_from(self, delta: Delta) -> None:
        """Take over what ``delta`` changed."""
        for index, changes in enumerate(delta.changes):
            ffn = self.ffn(index)
            if delta.scales:
                ffn.rescale(_tensor(delta.scales[index], ffn.scale))
            for kind, change in changes.items():
                matrix: TrainedMatrix = getattr(ffn, kind)
                matrix.take(change)

    def scales(self, index: int) -> Floats:
        """What layer ``index``'s neurons are scaled by (neurons)."""
        return as_array(self.ffn(index).scale)

    @property
    def density(self) -> float:
        """Mean share of active neurons in the last pass."""
        return float(torch.stack(self.densities).mean())

    @property
    def pressure(self) -> Tensor:
        """Mean pressure of the last pass."""
        return torch.stack(self.pressures).mean()


class PressureControl:
    """Chooses the weight of the pressure so that the density follows a line down to its target.

    The weight grows while the density is above the line and shrinks below it (integral control in the
    logarithm); the line falls from the first density seen to ``target`` over ``ramp`` steps.
    """

    def __init__(self, target: float, ramp: int, weight: float = 0.02, gain: float = 0.4) -> None:
        self.target, self.ramp, self.gain = target, max(1, ramp), gain
        self.weight = weight
        self.start = 0.0

    def wanted(self, step: int) -> float:
        """The density that step ``step`` should have."""
        done = min(1.0, step / self.ramp)
        return self.start + (min(self.target, self.start) - self.start) * done

    def observe(self, step: int, density: float) -> None:
        """Take the density of a step into account."""
        if not self.start:
            self.start = density
        error = (density - self.wanted(step)) / max(self.target, 1e-3)
        self.weight = min(20.0, max(1e-4, self.weight * math.exp(self.gain * max(-1.0, min(1.0, error)))))


class _Divergence(torch.autograd.Function):
    """KL(teacher ‖ student) of the next token, without ever holding the logits of all positions."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, head: Tensor, rows: int) -> Tensor:
        """The mean; the gradient is made in the same pass."""
        total = torch.zeros((), device=student.device)
        gradient = torch.empty_like(student)
        for first in range(0, len(student), rows):
            piece = slice(first, first + rows)
            log_model = functional.log_softmax(functional.linear(student[piece], head).float(), dim=-1)
            log_base = functional.log_softmax(functional.linear(teacher[piece], head).float(), dim=-1)
            base = log_base.exp()
            total += (base * log_base.sub_(log_model)).sum()
            gradient[piece] = log_model.exp_().sub_(base).to(head.dtype) @ head
        ctx.save_for_backward(gradient)
        ctx.count = len(student)
        return total / len(student)

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of the student's hidden rows."""
        (gradient,) = ctx.saved_tensors
        return gradient * (outer / ctx.count).to(gradient.dtype), None, None, None


def divergence(student: Tensor, teacher: Tensor, head: Tensor, rows: int = 256) -> Tensor:
    """Mean KL(teacher ‖ student) in nats over positions (n, width), ``head`` (vocabulary, width) frozen."""
    result: Tensor = _Divergence.apply(student, teacher, head, rows)  # type: ignore[no-untyped-call]
    return result
