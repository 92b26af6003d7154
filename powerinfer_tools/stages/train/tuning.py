"""Fine-tuning a low-rank predictor in torch, from where the singular value decomposition leaves it."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from powerinfer_formats.predictors import LowRank
from powerinfer_kernels import RowType
from powerinfer_tools.stages.train.layer_data import LayerData, Records
from powerinfer_tools.stages.train.low_rank import as_stored
from powerinfer_tools.stages.train.naming import Fit, level_for

Tensor = torch.Tensor
#: Φ(z) is close to 1 / (1 + e^(−1.702 z)): a start whose probabilities are those of the decomposition.
_LOGISTIC = 1.702


@dataclass(frozen=True)
class Tuning:
    """``steps`` of ``batch`` records, at a rate that rises to ``learning_rate`` and falls to nothing; every
    ``validate_every`` steps the state is judged, and the best one is kept."""

    steps: int = 400
    batch: int = 256
    learning_rate: float = 2e-3
    validate_every: int = 50
    patience: int = 3
    device: str = "cpu"
    seed: int = 0


def tune(start: Fit, data: LayerData, recall: float, row_type: RowType, options: Tuning) -> Fit:
    """``start`` after training, or ``start`` itself where nothing better was found.

    Binary cross-entropy of which neurons are active; active ones weigh as much in all as the others. Half of
    a batch are mixtures of two records: the gate itself says what is active for them, so no input is seen
    twice. A state is judged by how few neurons it names to find the share ``recall`` of the active ones in
    the records to check with, in the rounding that will be stored.
    """
    generator = torch.Generator().manual_seed(options.seed * 100_003 + data.index)
    net = _Net(start, data, options.device)
    best, least, waited = start, _named(start, data.check, recall), 0
    optimizer = torch.optim.Adam(net.parameters, lr=options.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, options.learning_rate, options.steps, pct_start=0.1
    )
    for step in range(1, options.steps + 1):
        optimizer.zero_grad()
        net.loss(options.batch, generator).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if step % options.validate_every and step != options.steps:
            continue
        now = net.fitted(row_type)
        count = _named(now, data.check, recall)
        best, least, waited = (now, count, 0) if count < least else (best, least, waited + 1)
        if waited == options.patience:
            break
    return best


def _named(made: Fit, check: Records, recall: float) -> int:
    """How many neurons ``made`` names to reach ``recall``."""
    normal = made.normal(check.inputs)
    return int((normal > level_for(normal, check.active, recall)).sum())


class _Net:
    """Log-odds of each neuron: outward · (inward · x) + bias."""

    def __init__(self, start: Fit, data: LayerData, device: str) -> None:
        assert isinstance(start.made, LowRank)
        odds = _LOGISTIC / start.deviation

        def tensor(values: npt.NDArray[Any]) -> Tensor:
            # A copy: training writes in place, and the start has to stay what it is.
            return torch.from_numpy(values.copy()).to(device)

        self.inward = tensor(start.made.inward).requires_grad_()
        self.outward = tensor(start.made.outward * (odds * start.scale)[:, None]).requires_grad_()
        self.bias = tensor(-start.mean * odds).requires_grad_()
        self.gate, self.added = tensor(data.gate), tensor(data.added)
        self.inputs = tensor(data.learn.inputs)
        self.active = tensor(data.learn.active)
        density = float(data.learn.active.mean())
        self.weight = torch.tensor((1 - density) / max(density, 1e-3), device=device)

    @property
    def parameters(self) -> list[Tensor]:
        return [self.inward, self.outward, self.bias]

    def loss(self, batch: int, generator: torch.Generator) -> Tensor:
        inputs, active = self._batch(batch, generator)
        odds = inputs @ self.inward.T @ self.outward.T + self.bias
        return torch.nn.functional.binary_cross_entropy_with_logits(odds, active, pos_weight=self.weight)

    def _batch(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(self.inputs), (2, batch), generator=generator).to(self.inputs.device)
        angle = torch.rand(batch // 2, 1, generator=generator).to(self.inputs.device) * (torch.pi / 2)
        first, second = self.inputs[rows[0]], self.inputs[rows[1, : batch // 2]]
        mixed = angle.cos() * first[: batch // 2] + angle.sin() * second
        active = torch.cat((mixed @ self.gate.T + self.added > 0, self.active[rows[0, batch // 2 :]]))
        return torch.cat((mixed, first[batch // 2 :])), active.float()

    def fitted(self, row_type: RowType) -> Fit:
        """The predictor as it would be stored; its level is in log-odds."""
        inward, outward, bias = (value.detach().cpu().numpy() for value in self.parameters)
        made = LowRank(
            as_stored(inward, row_type), as_stored(outward, row_type), np.zeros(len(bias), np.float32)
        )
        return Fit(made, np.ones_like(bias), -bias, np.ones_like(bias), in_gates=False)
