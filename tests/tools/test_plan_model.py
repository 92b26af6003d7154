"""Plans of a real model: its shape, the engine's memory, its profile, and the stage as a whole."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from powerinfer_formats.plan import Plan
from powerinfer_formats.profile import Corpus, LayerSums, Profile
from powerinfer_tools.engine.engine import Engine
from powerinfer_tools.errors import PlanError
from powerinfer_tools.measure.hardware.presets import PC_LOW
from powerinfer_tools.model.device_memory import overhead
from powerinfer_tools.model.loading import Model, load_model
from powerinfer_tools.model.shapes import ModelShape, neuron_bytes, shape_of_model
from powerinfer_tools.stages.plan import PlanRequest, make_plan, memory
from powerinfer_tools.stages.plan.frequencies import model_frequencies
from powerinfer_tools.stages.plan.planner import Budgets, PlanOptions
from powerinfer_tools.stages.plan.request import make_plan as plan_for

MIB = 1 << 20


@pytest.fixture(scope="module")
def model(smollm2: Path) -> Iterator[Model]:
    opened = load_model(smollm2)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def shape(model: Model) -> ModelShape:
    return shape_of_model(model)


@pytest.fixture(scope="module")
def profile(model: Model) -> Profile:
    """Counts that differ from layer to layer, as a power law over shuffled neurons."""
    random = np.random.default_rng(1)
    tokens, neurons = 1000, model.hyper.neurons
    sums = []
    for layer in range(model.hyper.layers):
        counts = (tokens * (np.arange(neurons) + 1.0) ** -(0.2 + 0.02 * layer)).astype(np.uint32)
        histogram = np.zeros((neurons, 128), np.uint32)
        histogram[:, 100] = random.permutation(counts)
        histogram[:, 0] = tokens - histogram[:, 100]
        ones = np.ones(neurons)
        sums.append(LayerSums(counts=None, histogram=histogram, gate_squares=ones, up_squares=ones))
    return Profile(
        fingerprint=model.fingerprint,
        model_name=model.name,
        architecture="llama",
        activation="silu",
        exact_zeros=False,
        tokens=tokens,
        window=512,
        target_density=0.25,
        corpus=(Corpus("made-up.txt", "0" * 64, tokens, 5000),),
        tool_version="test",
        sums=tuple(sums),
    )


def test_shape_is_that_of_the_file(shape: ModelShape, model: Model) -> None:
    assert (len(shape.layers), shape.width, shape.vocabulary) == (30, 576, 49152)
    assert {layer.neurons for layer in shape.layers} == {1536}
    # Gate and up rows in Q4_1: 18 blocks of 20 bytes; the transposed down row in Q8_0: 18 of 34.
    assert neuron_bytes(shape.layers[0]).total == 2 * 360 + 612
    assert shape.fingerprint == model.fingerprint
    assert not shape.exact_zeros


def test_memory_is_what_the_engine_takes(shape: ModelShape, model: Model) -> None:
    engine = Engine(model, threads=1, context=300, batch=64)
    try:
        taken = engine.report().memory
    finally:
        engine.close()
    assert taken.kv_cache == len(shape.layers) * memory.kv_cache_bytes(shape, memory.Workload(300))
    # The engine of a source model has no buffer for a hot side.
    hot_out = 64 * 4 * shape.width
    planned = memory.cpu_scratch_bytes(shape, 64) + memory.rotary_bytes(shape, 300)
    assert taken.scratch == planned - hot_out


def test_budgets_of_the_demo_model(shape: ModelShape, profile: Profile) -> None:
    """The more VRAM, the more is there; the sums of the plan file are checked where it is written."""
    placed = []
    for megabytes in (48, 72, 96, 400):
        plan = plan_for(shape, profile, PC_LOW, Budgets(megabytes * MIB), PlanOptions(context=1024))
        assert plan.memory.vram_used <= megabytes * MIB
        there = {unit.name: unit.bytes for unit in plan.units if unit.device == "gpu"}
        hot = sum(layer.hot_neurons for layer in plan.layers)
        assert sum(layer.vram_bytes for layer in plan.layers) == hot * 1332
        assert there["reserve"] == overhead(plan.memory.vram_capacity)
        placed.append(plan.memory.vram_used)
        assert plan.provenance.corpus_tokens == 1000
        assert all(layer.mode == "dense" for layer in plan.layers)
    assert placed == sorted(placed)
    assert all(layer.attention == "gpu" for layer in plan.layers)
    assert {"attention", "kv_cache", "head", "scratch"} <= set(there)


def test_frequencies_come_from_the_profile_hottest_first(shape: ModelShape, profile: Profile) -> None:
    frequencies = model_frequencies(shape, profile)
    assert frequencies.layers is not None
    for layer in (0, 29):
        np.testing.assert_array_equal(frequencies.layers[layer], np.sort(profile.frequency(layer))[::-1])
    plan = plan_for(
        shape, profile, PC_LOW, Budgets(56 * MIB), PlanOptions(objective="frequency", context=1024)
    )
    for layer in plan.layers:
        counts = np.sort(profile.counts(layer.index))[::-1]
        share = counts[: layer.hot_neurons].sum() / counts.sum()
        assert layer.hot_activation_share == pytest.approx(share, rel=1e-12)


def test_a_profile_of_another_model_is_refused(shape: ModelShape, profile: Profile) -> None:
    other = replace(profile, fingerprint="ab" * 32, model_name="Another")
    with pytest.raises(PlanError, match=rf"Another \(abababababab…\), not for {shape.name}"):
        model_frequencies(shape, other)
    with pytest.raises(PlanError, match="29 layers"):
        model_frequencies(replace(shape, fingerprint=None), replace(profile, sums=profile.sums[:-1]))


def test_the_stage_writes_the_same_bytes_again(smollm2: Path, profile: Profile, tmp_path: Path) -> None:
    profile.save(tmp_path / "p.safetensors")
    request = PlanRequest(
        model=smollm2, profile=tmp_path / "p.safetensors", hardware="pc-low", vram_bytes=72 * MIB
    )
    for name in ("a.json", "b.json"):
        make_plan(request).save(tmp_path / name)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    plan = Plan.load(tmp_path / "a.json")
    plan.require_model(profile.fingerprint, "x", "y")
    assert 0 < plan.memory.vram_used <= 72 * MIB
