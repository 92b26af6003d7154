"""Which layers are predicted, and how surely, so that perplexity stays within a budget."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from powerinfer_tools.progress import Progress
from powerinfer_tools.stages.train.choice import Candidate, choose
from powerinfer_tools.stages.train.expected_loss import ExpectedLoss
from powerinfer_tools.stages.train.layer_data import LayerData
from powerinfer_tools.stages.train.meter import Measured, Meter
from powerinfer_tools.stages.train.naming import Fit, Floats, level_for

#: Shares of active neurons to be found that are tried in each layer; the first is what its sensitivity to
#: errors is measured at.
RECALLS = (0.95, 0.8, 0.9, 0.97, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9999)
#: Choices that are measured at most, each with a limit corrected by what the one before came to.
_ROUNDS = 5
#: A choice that uses this share of the budget is good enough.
_ENOUGH = 0.8


@dataclass(frozen=True)
class Setting:
    """One way to compute a layer: thresholds of its predictor, or None for gate-first. ``touched`` are the
    bytes that a token reads of predictor and FFN; ``error`` is the mean squared norm of what the FFN's
    output loses."""

    thresholds: Floats | None
    touched: float
    error: float


def settings(data: LayerData, made: Fit, nbytes: int) -> list[Setting]:
    """Gate-first, then ``made`` (of ``nbytes``) at each of :data:`RECALLS`; then naming as many neurons, but
    those that are expected to cost most, where that is known. Which rule is better is measured."""
    normal, active = made.normal(data.check.inputs), data.check.active
    levels = [level_for(normal, active, recall) for recall in RECALLS]
    named = [normal > level for level in levels]
    thresholds = [made.threshold(level) for level in levels]
    if made.in_gates:
        loss = ExpectedLoss(made, data.unit_losses(), data.model.hyper.activation_cut)
        expected = loss.of(normal)
        limits = np.quantile(expected, [1 - float(one.mean()) for one in named])
        named += [expected > limit for limit in limits]
        thresholds += [loss.thresholds(float(limit)) for limit in limits]
    choices = [Setting(None, data.gate_bytes + float(active.mean()) * data.other_bytes, 0.0)]
    for values, some, error in zip(thresholds, named, data.missing(named), strict=True):
        choices.append(Setting(values, nbytes + data.rows_touched(some, active), error))
    return choices


@dataclass(frozen=True)
class Sensitivity:
    """How a layer's divergence follows the error of its output: measured at two settings, a line in between.

    A line through the origin is not enough: errors are known from the trace's records, and a predictor
    misses more on other text, however surely it finds what is active in those.
    """

    errors: tuple[float, float]
    divergences: tuple[float, float]

    def price(self, option: Setting) -> float:
        """Divergence that ``option`` is expected to cause, alone."""
        if option.thresholds is None:
            return 0.0
        (low, high), (least, most) = self.errors, self.divergences
        slope = max(0.0, most - least) / max(high - low, 1e-30)
        return least + slope * max(0.0, option.error - low)


def sensitivities(
    meter: Meter, windows: Sequence[int], layers: Sequence[Sequence[Setting]], progress: Progress
) -> list[Sensitivity]:
    """That of each layer, measured with that layer alone predicted: by the setting that errs least, and by
    the first.

    Small errors of different layers are unrelated, and the divergence grows with their squares: so what
    several layers cost together is about the sum of what each costs.
    """
    progress.start("measuring each layer's share", 2 * len(layers), "settings")
    costs = []
    for index, options in enumerate(layers):
        points = []
        for trial in (min(options[1:], key=lambda option: option.error), options[1]):
            alone = [trial.thresholds if layer == index else None for layer in range(len(layers))]
            points.append((trial.error, meter.measure(alone, windows).divergence))
            progress.advance(1)
        errors, divergences = zip(*points, strict=True)
        costs.append(Sensitivity(errors, divergences))
    progress.finish()
    return costs


def allocate(
    meter: Meter,
    windows: Sequence[int],
    layers: Sequence[Sequence[Setting]],
    max_increase: float,
    progress: Progress,
) -> list[Setting]:
    """One setting of each layer: fewest bytes touched, with a divergence of at most
    ln(1 + ``max_increase``), which is what it may add to the mean loss, measured over ``windows``. All
    gate-first where nothing else fits."""
    measured_alone = sensitivities(meter, windows, layers, progress)
    allowed = limit = math.log1p(max_increase)
    priced = [
        [Candidate(layer.price(option), option.touched, option) for option in options]
        for layer, options in zip(measured_alone, layers, strict=True)
    ]
    best = [options[0] for options in layers]
    for _ in range(_ROUNDS):
        chosen: list[Setting] = [candidate.what for candidate in choose(priced, limit)]
        measured = meter.measure([setting.thresholds for setting in chosen], windows)
        progress.note(_told(chosen, measured))
        if measured.divergence <= allowed and _touched(chosen) < _touched(best):
            best = chosen
        if _ENOUGH * allowed <= measured.divergence <= allowed or measured.divergence == 0:
            break
        limit *= 0.95 * allowed / measured.divergence
    return best


def _touched(chosen: Sequence[Setting]) -> float:
    return sum(setting.touched for setting in chosen)


def _told(chosen: Sequence[Setting], measured: Measured) -> str:
    count = sum(setting.thresholds is not None for setting in chosen)
    return (
        f"predicting {count} of {len(chosen)} layers: {_touched(chosen) / 2**20:.1f} MiB of FFN a token, "
        f"divergence {measured.divergence:.2e}, perplexity {measured.increase:+.2%}"
    )
