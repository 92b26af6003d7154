"""Files some of whose layers have experts, and others one FFN, from a profile to a split file that runs: such
an FFN is one expert that every token takes, or, where its activation makes zeros, groups of neurons."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine_logits import logits
from hybrid_families import EXPERTS, NEURONS
from hybrid_profiles import TOKENS
from mixed_splits import EAGER, GROUP, Split, planned
from powerinfer_formats.errors import BadField
from powerinfer_formats.plan import Plan
from powerinfer_formats.split import SplitFile
from powerinfer_formats.split_layout import KEY_VERSION, source_names
from powerinfer_tools.engine import Engine
from powerinfer_tools.engine.observation import counters
from powerinfer_tools.errors import ConvertError, ModelError
from powerinfer_tools.inspect.describe import describe
from powerinfer_tools.model.loading import load_model
from powerinfer_tools.stages.plan import verification, verified_units
from powerinfer_tools.stages.plan.report import render_plan

CASES = ("deepseek2", "deepseek2-lite", "dots1", "lfm2moe", "llama4", "glm-dsa", "mimo2")


@pytest.mark.parametrize("case", CASES)
def test_a_split_file_has_the_bits_of_its_source(case: str, tmp_path: Path) -> None:
    made = Split(tmp_path, case)
    assert made.dense
    assert made.routed
    plan = made.plan
    assert plan.version == 4
    assert plan.memory.vram_used == 0
    path = made.convert()
    assert Plan.load(made.folder / "plan.json") == plan
    experts = plan.model.experts
    assert experts is not None
    assert experts.dense is not None
    assert list(experts.dense.layers) == made.dense
    for index, layer in enumerate(plan.layers):
        assert (layer.hot_neurons, layer.mode, layer.attention) == (0, "dense", "cpu")
        assert plan.neurons_of(index) == (
            made.facts[index].neurons if index in made.dense else plan.model.neurons
        )
        assert layer.ram_bytes > 0
    expected = logits(made.source, TOKENS)
    for options in ({}, {"threads": 3}, {"batch": 3}, {"mode": "dense"}):
        np.testing.assert_array_equal(logits(path, TOKENS, **options), expected)
    split = SplitFile.open(path)
    assert split.gguf.metadata[KEY_VERSION] == 4
    assert split.layers == ()
    for index, units in enumerate(split.units):
        count = 1 if index in made.dense else EXPERTS
        assert (units.order.tolist(), units.hot, units.group) == (
            made.profile.order(index).tolist(), 0, 1,
        )  # fmt: skip
        assert len(units.order) == count
    source = load_model(made.source).source
    for name in source_names(made.dense[0]):
        np.testing.assert_array_equal(split.gguf.tensor(name), source.tensor(name))
    split.close()


@pytest.mark.parametrize("activation", [None, "relu"])
def test_the_planner_places_layers_of_both_kinds(activation: str | None, tmp_path: Path) -> None:
    made = Split(tmp_path, "dots1", activation)
    plan = planned(made.source, made.profile, vram=1 << 22, hardware=EAGER)
    assert plan.memory.vram_used <= plan.memory.vram_capacity
    for index, layer in enumerate(plan.layers):
        assert (layer.hot_neurons, layer.attention) == (plan.neurons_of(index), "gpu")
    np.testing.assert_array_equal(
        logits(made.convert(plan), TOKENS, device="none"), logits(made.convert(), TOKENS)
    )


def test_experts_that_read_what_is_weighed_are_not_placed(tmp_path: Path) -> None:
    made = Split(tmp_path, "llama4")
    plan = planned(made.source, made.profile, vram=1 << 22)
    assert plan.memory.vram_used == 0
    assert "places nothing of models with experts whose input is weighed" in plan.verdict
    path = made.convert()
    engine = Engine(load_model(path), threads=1, device="cpu")
    notices = engine.weights.notices
    engine.close()
    assert any("does not compute models with experts whose input is weighed" in notice for notice in notices)
    np.testing.assert_array_equal(logits(path, TOKENS, device="cpu"), logits(path, TOKENS))


@pytest.mark.parametrize("case", ["dots1", "deepseek2", "llama4"])
@pytest.mark.parametrize("activation", ["relu", "relu2"])
def test_zeros_of_dense_layers_are_skipped_with_the_same_bits(
    case: str, activation: str, tmp_path: Path
) -> None:
    """Neurons are counted, sorted and, in mode gate-first, left out where they are zero."""
    made = Split(tmp_path, case, activation)
    for index in made.dense:
        assert made.profile.neurons(index) == NEURONS
        assert 0.1 < made.profile.density(index) < 0.9
    plan = made.plan
    for index in made.dense:
        plan = made.changed(index, mode="gate-first")
    path = made.convert(plan)
    split = SplitFile.open(path)
    assert [layer.index for layer in split.layers] == made.dense
    for index in made.dense:
        layer, order = split.layer(index), made.profile.order(index)
        assert layer is not None
        np.testing.assert_array_equal(layer.order, order)
        counts = made.profile.counts(index)[order].astype(np.int64)
        assert (np.diff(counts) <= 0).all()
        assert split.units[index].group == GROUP
    assert all(split.layer(index) is None for index in made.routed)
    split.close()
    expected = logits(path, TOKENS, mode="dense")
    for options in ({"mode": "gate-first"}, {}, {"mode": "gate-first", "threads": 3, "batch": 4}):
        np.testing.assert_array_equal(logits(path, TOKENS, **options), expected)
    # Another order of neurons, of which the sums are made.
    bound = 500 * np.finfo(np.float32).eps
    source = logits(made.source, TOKENS)
    assert np.abs(expected - source).max() <= bound * np.abs(source).max()


def test_neurons_that_are_zero_are_not_read(tmp_path: Path) -> None:
    """NaN in the up and down rows of every neuron that no token activates."""
    made, few = Split(tmp_path, "dots1", "relu"), TOKENS[:2]
    seen = counters(NEURONS, histogram=False)
    engine = Engine(load_model(made.source), threads=1, context=8, batch=8, observed=[seen, None])
    engine.absorb(few)
    engine.close()
    path = made.convert(made.changed(0, mode="gate-first"))
    split, data = SplitFile.open(path), bytearray(path.read_bytes())
    layer = split.layer(0)
    assert layer is not None
    idle = np.flatnonzero(seen.counts[layer.order] == 0)
    assert 3 < len(idle) < NEURONS
    start, size = split.gguf.info("blk.0.ffn_cold.bundle").offset, layer.layout.record_bytes
    for position in idle.tolist():
        for offset, nbytes in list(zip(layer.layout.offsets, layer.layout.row_sizes, strict=True))[1:]:
            at = start + position * size + offset
            data[at : at + nbytes] = np.full(nbytes // 4, np.nan, "<f4").tobytes()
    split.close()
    poisoned = tmp_path / "poisoned.powerinfer.gguf"
    poisoned.write_bytes(data)
    got = logits(poisoned, few, mode="gate-first", prompt=1)
    np.testing.assert_array_equal(got, logits(path, few, mode="gate-first", prompt=1))


def test_a_profile_that_counts_a_dense_layer_as_one_expert_keeps_its_order(tmp_path: Path) -> None:
    """As profiles of earlier versions do, whatever the activation."""
    made = Split(tmp_path, "dots1", "relu")
    sums = list(made.profile.sums)
    tokens = np.full(1, made.profile.tokens)
    sums[0] = replace(
        sums[0], counts=tokens.astype(np.uint64), gate_squares=tokens * 1.0, up_squares=tokens * 1.0
    )
    older = replace(made.profile, sums=tuple(sums))
    older.save(made.saved)
    plan = planned(made.source, older)
    layer = SplitFile.open(made.convert(plan)).layer(0)
    assert layer is not None
    assert layer.order.tolist() == list(range(NEURONS))


def test_modes_that_such_a_file_has_not_are_refused(tmp_path: Path) -> None:
    silu = Split(tmp_path, "dots1").convert()
    for mode, why in (("gate-first", "has no exact zeros"), ("thresholded", "a split file with thresholds")):
        with pytest.raises(ModelError, match=why):
            Engine(load_model(silu), threads=1, mode=mode)
    folder = tmp_path / "relu"
    folder.mkdir()
    relu = Split(folder, "dots1", "relu").convert()
    with pytest.raises(ModelError, match="needs predictors"):
        Engine(load_model(relu), threads=1, mode="predicted")


def test_a_plan_of_other_layers_is_refused(tmp_path: Path) -> None:
    made = Split(tmp_path, "lfm2moe")
    experts = made.plan.model.experts
    assert experts is not None
    assert experts.dense is not None

    def of(**changes: object) -> Plan:
        dense = replace(experts.dense, **changes)
        model = replace(made.plan.model, experts=replace(experts, dense=dense))
        return replace(made.plan, model=model)

    with pytest.raises(ConvertError, match="experts in other layers than"):
        made.convert(of(layers=(1,)))
    with pytest.raises(ConvertError, match="other groups of neurons"):
        made.convert(of(group=GROUP))
    with pytest.raises(BadField, match=r"model.experts.dense.layers are \[0, 1\], expected some of 2 layers"):
        made.convert(of(layers=(0, 1)))
    with pytest.raises(BadField, match=r"model.experts.dense.group is 45, expected 1 to 44"):
        made.convert(of(group=NEURONS + 1))
    with pytest.raises(ConvertError, match="--quant Q4_0: experts are placed as wholes"):
        made.convert(quant="Q4_0")


def test_such_a_file_is_described_layer_by_layer(tmp_path: Path) -> None:
    made = Split(tmp_path, "dots1", "relu")
    assert f"1 of them of {NEURONS} neurons instead" in render_plan(made.plan)
    layers = describe(made.convert()).facts["layers"]
    assert layers[0]["neurons"] == NEURONS
    assert layers[1]["experts"] == EXPERTS


@pytest.mark.parametrize("activation", [None, "relu"])
def test_the_cost_model_is_verified_on_the_cpu(
    activation: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verification, "_ROUNDS", 1)
    monkeypatch.setattr(verified_units, "ENOUGH_BYTES", 1 << 16)
    made = Split(tmp_path, "dots1", activation)
    found = verification.verify(made.source, made.saved, made.plan, threads=1)
    modes = ["dense"] if activation is None else ["dense", "gate-first"]
    assert [(row.device, row.mode, row.hot_share) for row in found.rows] == [
        ("none", mode, 0.0) for mode in modes
    ]
    assert all(0 < row.predicted_seconds < 60 and 0 < row.measured_seconds < 60 for row in found.rows)
    assert "splits are not timed where dense layers stand beside experts" in found.notes[0]
