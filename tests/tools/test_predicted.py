"""Mode predicted with our own kinds of predictors: the engine against the float64 reference."""

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from engine_logits import MARGIN, logits, margin, near, predictor_inputs
from powerinfer_formats.split import SplitLayer
from powerinfer_kernels import available_isas, reference
from powerinfer_tools.model.layer_weights import LayerWeights
from powerinfer_tools.model.loading import load_model
from powerinfer_tools.model.reference import forward, predicted_neurons
from predicted_models import predicted_split

TOKENS = 12
KINDS = ("low-rank", "sign")


@dataclass(frozen=True)
class Case:
    """A split file, and tokens over which no decision hangs on the rounding of float32."""

    path: Path
    tokens: list[int]


@pytest.fixture(scope="module", params=KINDS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    tiny, path, _ = predicted_split(tmp_path_factory.mktemp("predicted"), kind=request.param)
    for seed in range(100):
        tokens = tiny.tokens(TOKENS, seed)
        if margin(path, tokens) > MARGIN and (request.param != "sign" or code_margin(path, tokens) > MARGIN):
            return Case(path, tokens)
    raise AssertionError("no tokens keep the distance")


def code_margin(path: Path, tokens: list[int]) -> float:
    """Least distance of an input from where its code changes, in steps of the code."""
    found = []
    for _, _, normed in predictor_inputs(load_model(path), tokens):
        _, step = reference.sign_code(normed)
        found.append(np.abs(np.abs(normed) / step % 1 - 0.5).min())
    return float(min(found))


def test_the_engine_computes_the_neurons_that_the_reference_names(case: Case) -> None:
    """And not what dense computes: the predictors miss some."""
    path, tokens, model = case.path, case.tokens, load_model(case.path)
    expected = forward(model, tokens, half_cache=True, predicted=True)[TOKENS // 2 - 1 :]
    got = logits(path, tokens, mode="predicted")
    near(got, expected)
    exact = forward(model, tokens, half_cache=True)[TOKENS // 2 - 1 :]
    assert np.abs(expected - exact).max() > 0.05 * np.abs(exact).max()
    for isa, threads in itertools.product(available_isas(), (1, 3)):
        assert np.array_equal(got, logits(path, tokens, mode="predicted", isa=isa, threads=threads))


def hot_or_predicted(layer: LayerWeights, x: np.ndarray, normed: np.ndarray) -> np.ndarray:
    named = predicted_neurons(layer, x, normed)
    assert isinstance(layer.ffn, SplitLayer)
    named[:, : layer.ffn.hot_neurons] = True
    return named


def test_hot_neurons_are_computed_whatever_the_predictor_says(case: Case) -> None:
    """With a device, the 16 hot ones are out of the predictor's hands; with torch's sums, near."""
    path, tokens, model = case.path, case.tokens, load_model(case.path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("powerinfer_tools.model.reference.predicted_neurons", hot_or_predicted)
        expected = forward(model, tokens, half_cache=True, predicted=True)[TOKENS // 2 - 1 :]
    near(logits(path, tokens, mode="predicted", device="cpu"), expected)
