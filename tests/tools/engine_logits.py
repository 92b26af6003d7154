"""Logits of the engine and of the float64 reference, for tests that hold one against the other."""

from pathlib import Path

import numpy as np
import pytest

from powerinfer_tools.engine import Engine
from powerinfer_tools.model.layer_weights import LayerWeights
from powerinfer_tools.model.loading import Model, load_model
from powerinfer_tools.model.reference import forward, predicted_neurons, predictor_scores

HALF = 2.0**-11  # unit roundoff of the cache
#: Least distance of a score from the threshold, in parts of the largest score: far above the rounding of
#: float32, so that the engine and float64 decide alike.
MARGIN = 5e-5


def logits(path: Path, tokens: list[int], *, prompt: int | None = None, **options: object) -> np.ndarray:
    """Logits after ``prompt`` tokens at once (without it, half of them) and after each that follows."""
    first = len(tokens) // 2 if prompt is None else prompt
    engine = Engine(load_model(path), **({"threads": 1} | options))  # type: ignore[arg-type]
    return of_engine(engine, tokens, prompt=first)


def of_engine(engine: Engine, tokens: list[int], *, prompt: int = 2) -> np.ndarray:
    """As :func:`logits`; closes the engine."""
    try:
        rows = [engine.prefill(tokens[:prompt]).copy()]
        return np.stack(rows + [engine.decode(token).copy() for token in tokens[prompt:]])
    finally:
        engine.close()


def greedy(path: Path, tokens: list[int], count: int, **options: object) -> list[int]:
    """``count`` tokens, each the likeliest."""
    engine = Engine(load_model(path), **({"threads": 1} | options))  # type: ignore[arg-type]
    try:
        chosen = [int(engine.prefill(tokens).argmax())]
        while len(chosen) < count:
            chosen.append(int(engine.decode(chosen[-1]).argmax()))
        return chosen
    finally:
        engine.close()


def near(got: np.ndarray, expected: np.ndarray) -> None:
    """Equal but for float32 rounding, which tips a cached value over to its neighbour now and then."""
    assert np.abs(got - expected).max() <= HALF * np.abs(expected).max()


def margin(path: Path, tokens: list[int]) -> float:
    """Least distance of a predictor's score from its threshold in a predicted forward pass, in parts of the
    largest score of its layer."""
    model, found = load_model(path), []
    for layer, x, normed in predictor_inputs(model, tokens):
        scores = predictor_scores(layer, x, normed)
        distance = np.abs(scores - layer.ffn.predictor.threshold)  # type: ignore[union-attr]
        found.append(float(distance.min() / np.abs(scores).max()))
    return min(found)


def predictor_inputs(model: Model, tokens: list[int]) -> list[tuple[LayerWeights, np.ndarray, np.ndarray]]:
    """What predictors can read in every layer of a predicted forward pass: residual stream and input."""
    seen = []

    def watch(layer: LayerWeights, x: np.ndarray, normed: np.ndarray) -> np.ndarray:
        seen.append((layer, x, normed))
        return predicted_neurons(layer, x, normed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("powerinfer_tools.model.reference.predicted_neurons", watch)
        forward(model, tokens, half_cache=True, predicted=True)
    return seen
