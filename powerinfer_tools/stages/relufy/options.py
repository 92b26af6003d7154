"""The options of relufy, and its results."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Values of ``activation``: act(gate)·up with relu; drelu also cuts up (TurboSparse, arXiv 2406.05955);
#: fatrelu takes gates above ``cut`` alone (ProSparse, arXiv 2402.13516).
TARGETS = ("relu", "drelu", "fatrelu")
#: The cut of models whose neurons have thresholds of their own, by the scales of their rows (:mod:`.cuts`).
NEURON_CUT = 0.25


@dataclass(frozen=True)
class RelufyOptions:
    """How to relufy.

    ``rank`` is that of the changes of gate and up; 0 trains them whole, as the down projection always is.
    ``cut`` is what gates must be above with fatrelu; without it, every neuron has a threshold of its own,
    chosen during the fit so that ``density`` of the neurons are active.
    ``steps`` counts distillation steps of ``batch`` windows of ``window`` tokens; ``fit_windows`` are the
    windows that the down projections are fitted to before (0: they are not). ``density`` is the share of
    active neurons that sparsity pressure aims at. ``patience`` ends the work after so many validations
    without a better model (0: never). ``quant`` is the row type of gate and up (see
    :func:`~powerinfer_tools.stages.relufy.export.ffn_types`). ``start`` is a delta whose changes the work
    begins with, and whose activation, cut and rank it keeps; there is no fit then. ``save_delta`` is where
    what was learned is written as a delta; the model is then the one that the delta makes.
    """

    model: Path
    corpus: tuple[Path, ...]
    output: Path
    activation: str = "relu"
    cut: float | None = None
    density: float = 0.2
    rank: int = 32
    steps: int = 400
    fit_windows: int = 32
    batch: int = 4
    window: int = 512
    learning_rate: float = 1e-3
    validation_windows: int = 8
    validate_every: int = 25
    patience: int = 0
    quant: str | None = None
    device: str = "cpu"
    threads: int | None = None
    seed: int = 0
    restart: bool = False
    start: Path | None = None
    save_delta: Path | None = None

    @property
    def target(self) -> tuple[str, float]:
        """The activation, and what a gate must be above with fatrelu."""
        if self.activation != "fatrelu":
            return self.activation, 0.0
        return self.activation, NEURON_CUT if self.cut is None else self.cut

    @property
    def fitted_density(self) -> float | None:
        """The density that thresholds of the neurons' own are chosen for; None: they have none."""
        return self.density if self.activation == "fatrelu" and self.cut is None else None


@dataclass(frozen=True)
class Reading:
    """One validation: held-out windows after ``tokens`` tokens of distillation."""

    tokens: int
    perplexity: float
    density: float
    kl: float


@dataclass(frozen=True)
class RelufyReport:
    """What was written and how good it is on the held-out windows; ``history`` is its course."""

    output: str
    delta: str | None
    activation: str
    dense_perplexity: float
    perplexity: float
    density: float
    kl: float
    tokens: int
    seconds: float
    history: tuple[Reading, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return vars(self) | {
            "perplexity_ratio": self.perplexity / self.dense_perplexity,
            "history": [dict(vars(reading)) for reading in self.history],
        }
