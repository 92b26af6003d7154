"""Files some of whose layers have experts, and others one FFN, with parts on torch's CPU device: such an FFN
is one expert that every token takes, or, where its activation makes zeros, neurons from a split point on."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine_logits import logits
from fake_gpus import FakeGpu, LatestGpu, on
from hybrid_families import EXPERTS
from mixed_splits import GROUP, Split
from powerinfer_formats.plan import Plan
from powerinfer_tools.engine import Engine
from powerinfer_tools.engine.hot.opening import planned_units
from powerinfer_tools.engine.hot.placement import Workload, fit, units_size
from powerinfer_tools.model.device_memory import budget_for
from powerinfer_tools.model.loading import load_model

TOKENS = [3, 41, 7, 7, 12, 0, 49, 25, 30, 2, 18, 5]
CASES = ("dots1", "lfm2moe", "deepseek2", "deepseek2-lite", "glm-dsa", "mimo2")


def placed(made: Split, *, dense: int, experts: int, attention: bool) -> Plan:
    """``dense`` neurons of layers with one FFN, ``experts`` of each other layer, and the attention of all."""
    layers = []
    for index, layer in enumerate(made.plan.layers):
        neurons = made.plan.neurons_of(index)
        hot = dense if index in made.dense else experts * neurons // EXPERTS
        layers.append(replace(layer, hot_neurons=hot, attention="gpu" if attention else "cpu"))
    return replace(made.plan, layers=tuple(layers))


def near(got: np.ndarray, expected: np.ndarray) -> None:
    """A KV cache of half precision on both sides, single precision elsewhere."""
    assert np.abs(got - expected).max() <= 2.0**-9 * np.abs(expected).max()


@pytest.mark.parametrize("case", CASES)
def test_an_ffn_of_one_expert_is_computed_on_a_device(case: str, tmp_path: Path) -> None:
    made = Split(tmp_path, case)
    expected = logits(made.source, TOKENS)
    whole = made.facts[made.dense[0]].neurons
    for dense, experts in ((whole, 0), (whole, 2), (0, EXPERTS), (whole, EXPERTS)):
        for attention in (False, True):
            path = made.convert(placed(made, dense=dense, experts=experts, attention=attention))
            for batch in (512, 3):
                near(logits(path, TOKENS, device="cpu", batch=batch), expected)


def test_neurons_and_experts_are_hot_in_one_model(tmp_path: Path) -> None:
    made = Split(tmp_path, "dots1", "relu")
    expected = logits(made.source, TOKENS)
    whole = made.facts[made.dense[0]].neurons
    for dense in (0, 16, whole):
        for experts in (0, 2, EXPERTS):
            for attention in (False, True):
                path = made.convert(placed(made, dense=dense, experts=experts, attention=attention))
                near(logits(path, TOKENS, device="cpu"), expected)


@pytest.mark.parametrize(("activation", "dense"), [(None, "whole"), ("relu", "some")])
def test_what_is_hot_is_reported_and_counted(activation: str | None, dense: str, tmp_path: Path) -> None:
    made = Split(tmp_path, "dots1", activation)
    neurons = made.facts[0].neurons if dense == "whole" else 16
    path = made.convert(placed(made, dense=neurons, experts=2, attention=True))
    engine = Engine(load_model(path), threads=1, device="cpu", context=32, batch=8)
    engine.prefill(TOKENS)
    engine.decode(1)
    shares, hot = engine.weights.stack.layer_shares(), engine.weights.stack.hot
    assert hot is not None
    assert [share.hot for share in shares] == [neurons, *[2] * (len(shares) - 1)]
    assert hot.hot_experts(0) == frozenset()
    held = hot.nbytes
    units = planned_units(engine.model)
    size = units_size(engine.model, units, Workload(8, 32))
    assert held == size.total
    # A token reads every hot byte of the dense layer, and of experts those that the router chooses.
    assert size.experts == 2 * sum(layer.ffn.expert_nbytes for layer in engine.model.layers[1:])  # type: ignore[union-attr]
    engine.close()


def test_less_memory_takes_units_of_both_kinds(tmp_path: Path) -> None:
    made = Split(tmp_path, "dots1", "relu")
    expected = logits(made.source, TOKENS)
    path = made.convert(placed(made, dense=made.facts[0].neurons, experts=EXPERTS, attention=False))
    model, work = load_model(path), Workload(8, 32)
    planned = planned_units(model)
    total = units_size(model, planned, work).total
    seen = set()
    for part in range(1, 9):
        units = fit(model, planned, total * part // 8, work)
        assert units_size(model, units, work).total <= total * part // 8
        seen.add(units.hot)
    assert len(seen) > 3
    model.close()
    for part in (4, 6):
        options = {"device": "cpu", "vram": total * part // 8, "batch": 8, "context": 32}
        near(logits(path, TOKENS, **options), expected)


@pytest.mark.parametrize("activation", [None, "relu"])
def test_the_budget_holds_what_is_allocated(
    activation: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Split(tmp_path, "dots1", activation)
    expected = logits(made.source, TOKENS)
    whole = made.facts[0].neurons
    path = made.convert(placed(made, dense=whole, experts=EXPERTS, attention=True))
    model = load_model(path)
    total = units_size(model, planned_units(model), Workload(8, 32)).total
    model.close()
    for room in (total, total - 1, total * 3 // 4):
        gpu, budget = FakeGpu(1 << 30), budget_for(room)
        on(monkeypatch, gpu)
        options = {"device": "cuda", "vram": budget, "batch": 8, "context": 32}
        near(logits(path, TOKENS, **options), expected)
        assert all(asked <= budget for asked in gpu.asked)


@pytest.mark.parametrize("activation", [None, "relu"])
def test_work_that_is_done_late_has_the_same_bits(
    activation: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything is done at the latest moment that is allowed, and in order."""
    made = Split(tmp_path, "dots1", activation)
    whole = made.facts[0].neurons
    for dense, experts in ((whole, 2), (whole // GROUP * GROUP if activation else 0, EXPERTS)):
        path = made.convert(placed(made, dense=dense, experts=experts, attention=True))
        expected = logits(path, TOKENS, device="cpu", batch=5)
        on(monkeypatch, LatestGpu())
        np.testing.assert_array_equal(logits(path, TOKENS, device="cuda", batch=5), expected)
