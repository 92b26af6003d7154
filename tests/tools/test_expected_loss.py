"""Naming neurons by what leaving them out costs: the formula, its thresholds, and that it costs less."""

import math

import numpy as np
import pytest

from powerinfer_formats.predictors import SignBits
from powerinfer_tools.stages.train.expected_loss import ExpectedLoss
from powerinfer_tools.stages.train.naming import Fit

NEURONS = 7


def make(cut: float) -> ExpectedLoss:
    rng = np.random.default_rng(3)
    mean, deviation, scale = (rng.uniform(0.2, 3, NEURONS).astype(np.float32) for _ in range(3))
    made = SignBits(np.zeros((NEURONS, 1), np.uint8), np.zeros(NEURONS, np.float32))
    return ExpectedLoss(
        Fit(made, scale, mean, deviation), rng.uniform(0.1, 9, NEURONS).astype(np.float32), cut
    )


@pytest.mark.parametrize("cut", [0.0, 0.25, 2.0])
def test_the_formula_is_the_integral(cut: float) -> None:
    loss = make(cut)
    for z in (-5.0, -1.3, 0.0, 0.7, 4.0):
        n = np.linspace(-12, 12, 200_001)
        step = n[1] - n[0]
        weight = np.exp(-n * n / 2) / math.sqrt(2 * math.pi) * step
        over = loss.deviation[:, None] * (z + n)
        mean = (np.where(over > 0, cut + over, 0.0) ** 2 * weight).sum(axis=1)
        found = loss.of(np.full((1, NEURONS), z))[0]
        # Φ is within 8e-8, times at most (cut + σ(|z| + 1))²; at the jump to cut² the sum may miss a step.
        allowed = 1e-6 * mean + 1e-7 * (cut + loss.deviation * (abs(z) + 1)) ** 2 + 0.4 * step * cut**2
        bound = loss.weight * allowed
        assert np.all(np.abs(found - loss.weight * mean) <= bound), z


@pytest.mark.parametrize("cut", [0.0, 0.25])
@pytest.mark.parametrize("limit", [1e-4, 0.3, 20.0])
def test_thresholds_are_where_the_loss_passes_the_limit(cut: float, limit: float) -> None:
    loss = make(cut)
    scores = loss.thresholds(limit).astype(np.float64)
    fit = loss.made
    for factor, below in ((-1e-3, True), (1e-3, False)):
        z = (fit.scale * (scores + factor) - fit.mean) / fit.deviation
        assert np.all((loss.of(z[None])[0] <= limit) == below)


def test_a_limit_that_nothing_reaches_names_nothing_and_none_names_all() -> None:
    loss = make(0.25)
    z = np.random.default_rng(1).uniform(-10, 10, (50, NEURONS))
    said = (z * loss.made.deviation + loss.made.mean) / loss.made.scale
    assert not (said > loss.thresholds(1e12)).any()
    assert (said > loss.thresholds(0.0)).all()


@pytest.mark.parametrize("cut", [0.0, 0.25])
def test_as_many_named_neurons_lose_less(cut: float) -> None:
    """Against the rule that goes by probability alone, where neurons err and matter unequally."""
    rng = np.random.default_rng(8)
    neurons, tokens = 60, 3000
    deviation = np.exp(rng.normal(size=neurons)).astype(np.float32)
    weight = np.exp(rng.normal(size=neurons)).astype(np.float32)
    z = rng.normal(-0.5, 1.2, (tokens, neurons)).astype(np.float32)
    over = deviation * (z + rng.normal(size=z.shape).astype(np.float32))
    energy = np.where(over > 0, cut + over, 0) ** 2 * weight
    made = SignBits(np.zeros((neurons, 1), np.uint8), np.zeros(neurons, np.float32))
    ones, zeros = np.ones(neurons, np.float32), np.zeros(neurons, np.float32)
    expected = ExpectedLoss(Fit(made, ones, zeros, deviation), weight, cut).of(z)
    for share in (0.2, 0.4, 0.6):
        by_loss = expected > np.quantile(expected, 1 - share)
        by_probability = z > np.quantile(z, 1 - share)
        lost = [np.where(named, 0, energy).sum() for named in (by_loss, by_probability)]
        assert lost[0] < 0.8 * lost[1]
