"""The density of each layer, against what its neurons did in the source model; and the server tells it."""

from pathlib import Path

import numpy as np
import pytest

from powerinfer_tools.engine import Engine
from powerinfer_tools.engine.layer_shares import LayerShare
from powerinfer_tools.engine.observation import counters
from powerinfer_tools.model.loading import load_model
from predicted_models import predicted_split
from served_models import Served
from tiny_models import CASES, TinyModel, make_tiny_model

HOT = 16


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> tuple[TinyModel, Path]:
    tiny, path, _ = predicted_split(tmp_path_factory.mktemp("shares"))
    return tiny, path


def active_shares(tiny: TinyModel, tokens: list[int]) -> list[float]:
    """The share of active neurons in each layer of the source model."""
    observed = [counters(tiny.spec.neurons, histogram=False) for _ in range(tiny.spec.layers)]
    with Engine(load_model(tiny.path), threads=1, observed=observed) as engine:
        engine.absorb(tokens)
    return [float(layer.counts.sum()) / (len(tokens) * tiny.spec.neurons) for layer in observed]


def shares(path: Path, tokens: list[int], decoded: int = 0, **options: object) -> list[LayerShare]:
    with Engine(load_model(path), threads=1, **options) as engine:  # type: ignore[arg-type]
        assert {layer.density for layer in engine.stack.layer_shares()} == {None}
        engine.prefill(tokens[: len(tokens) - decoded])
        for token in tokens[len(tokens) - decoded :]:
            engine.decode(token)
        made = engine.stack.layer_shares()
        assert np.mean([layer.density for layer in made]) == pytest.approx(engine.report().density)
        return made


@pytest.mark.parametrize("decoded", [0, 5, 29])
def test_gate_first_computes_the_active_neurons(split: tuple[TinyModel, Path], decoded: int) -> None:
    tiny, path = split
    tokens = tiny.tokens(30)
    made = shares(path, tokens, decoded, mode="gate-first")
    assert [layer.density for layer in made] == pytest.approx(active_shares(tiny, tokens))
    assert {(layer.mode, layer.units, layer.hot, layer.hot_share) for layer in made} == {
        ("gate-first", tiny.spec.neurons, 0, 0.0)
    }


def test_dense_computes_all(split: tuple[TinyModel, Path]) -> None:
    tiny, path = split
    for file in (path, tiny.path):
        assert {layer.density for layer in shares(file, tiny.tokens(20), mode="dense")} == {1.0}


def test_hot_neurons_are_computed_whole_and_counted(split: tuple[TinyModel, Path]) -> None:
    pytest.importorskip("torch", reason="the hot side runs through torch")
    tiny, path = split
    tokens = tiny.tokens(30)
    made = shares(path, tokens, 5, mode="gate-first", device="cpu")
    for layer, active in zip(made, active_shares(tiny, tokens), strict=True):
        assert layer.hot == HOT
        assert layer.density is not None
        assert active < layer.density <= active + HOT / tiny.spec.neurons
        assert layer.hot_share == pytest.approx(HOT / tiny.spec.neurons / layer.density)
    predicted = shares(path, tokens, 5, mode="predicted", device="cpu")
    assert all(layer.density and 0 < layer.density < 1 for layer in predicted)


def test_experts(tmp_path: Path) -> None:
    tiny = make_tiny_model(tmp_path, CASES["qwen3moe"])
    (layer, *_) = shares(tiny.path, tiny.tokens(12))
    assert layer.density == tiny.spec.experts_used / tiny.spec.experts
    assert (layer.units, layer.hot, layer.hot_share) == (tiny.spec.experts, 0, 0.0)


def test_the_server_tells_them(split: tuple[TinyModel, Path]) -> None:
    tiny, path = split
    tokens = tiny.tokens(30)
    with Served(path, mode="gate-first") as served:
        served.ready()
        assert {
            layer["density"] for layer in served.http.get(f"{served.url}/machine").json()["engine"]["layers"]
        } == {None}
        served.complete(tokens, max_tokens=0, temperature=0)
        layers = served.http.get(f"{served.url}/machine").json()["engine"]["layers"]
        metrics = served.http.get(f"{served.url}/metrics").text
    expected = active_shares(tiny, tokens)
    assert [layer["density"] for layer in layers] == pytest.approx(expected)
    for index, layer in enumerate(layers):
        label = f'{{layer="{index}",mode="gate-first"}}'
        assert f"powerinfer:layer_density{label} {layer['density']}" in metrics
        assert f"powerinfer:layer_hot_share{label} 0.0" in metrics
