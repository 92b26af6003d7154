"""plan --verify of mixtures of experts: rows by number of hot experts, predicted by the planner's tables."""

from pathlib import Path

import numpy as np
import pytest

from expert_models import PreparedExperts
from powerinfer_formats.hardware import CpuInfo, FFNCurve, HardwareProfile, MachineInfo
from powerinfer_formats.profile import Profile
from powerinfer_tools.engine import Engine
from powerinfer_tools.engine.observation import counters
from powerinfer_tools.model.loading import load_model
from powerinfer_tools.stages.plan import PlanRequest, make_plan, verification, verified_units
from powerinfer_tools.stages.plan.costs import Machine
from powerinfer_tools.stages.plan.memory import experts_of
from powerinfer_tools.stages.plan.verification import Case, Grid, verify
from powerinfer_tools.stages.plan.verification_rows import BATCH, PROMPT, vram_of
from powerinfer_tools.stages.plan.verified_units import Text, VerifiedUnits
from powerinfer_tools.stages.profile import ProfileOptions, run_profile
from tiny_models import CASES, make_tiny_model

TEXT = "the cat sat on the mat and the dog sat on the log; a quick brown fox jumps over the lazy dog. " * 10


class Profiled:
    """A tiny mixture with its profile and a plan."""

    def __init__(self, folder: Path, case: str) -> None:
        self.model = make_tiny_model(folder, CASES[case]).path
        text = folder / "text.txt"
        text.write_text(TEXT)
        self.profile = folder / "t.profile.safetensors"
        run_profile(ProfileOptions(self.model, (text,), self.profile, window=64, threads=1))
        cpu = CpuInfo("a CPU", 1, "scalar", 1e10, 1 << 34, (1.0,), (1e10,))
        hardware = folder / "hardware.toml"
        HardwareProfile(MachineInfo("m", "measured", "2026-11-26"), cpu).save(hardware)
        self.plan = make_plan(PlanRequest(self.model, profile=self.profile, hardware=str(hardware)))

    def units(self) -> VerifiedUnits:
        model = load_model(self.model)
        try:
            return VerifiedUnits(model, Profile.load(self.profile), None)
        finally:
            model.close()


@pytest.fixture(scope="module", params=["mixtral", "qwen2moe", "qwen3moe"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Profiled:
    return Profiled(tmp_path_factory.mktemp("verified"), request.param)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "_ROUNDS", 1)
    monkeypatch.setattr(verified_units, "ENOUGH_BYTES", 1 << 18)


def test_rows_are_measured_and_predicted(
    made: Profiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    found = verify(made.model, made.profile, made.plan, threads=1)
    assert (found.rows[0].device, found.rows[0].hot_share) == ("none", 0.0)
    assert (found.rows[0].predicted_choices, found.rows[0].measured_choices) == (0.0, 0.0)
    assert len(found.rows) >= 3
    for row in found.rows[1:]:
        assert (row.device, row.mode) == ("cpu", "dense")
        assert 0 < row.hot_share < 1
        assert row.hot_share <= row.predicted_choices <= 1  # the busiest come first
        assert 0 < row.measured_choices <= 1
    for row in found.rows:
        assert 0 < row.predicted_seconds < 60
        assert 0 < row.measured_seconds < 60
    assert list(tmp_path.iterdir()) == []
    assert found.as_dict()["rows"][1]["predicted_choices"] == found.rows[1].predicted_choices
    assert "points, for the tokens that were timed" in found.notes[0]


def test_predictions_follow_the_planners_tables(made: Profiled) -> None:
    """Samples made of known parts have no error, whatever the hot side costs; what takes twice as long was
    predicted at half of it. Cold seconds and hot bytes are what the tokens' choices make of them."""
    units, profile = made.units(), Profile.load(made.profile)
    layer = units.shape.layers[0]
    experts = experts_of(layer)
    rates = ((1.0,), (2e9,), (2e9,))
    shapes = [layer.ffn, *([experts.shared] if experts.shared else [])]
    curves = tuple(
        FFNCurve(layer.width, rows[0].rows, "F32", "F32", "F32", 2e9, *rates, overhead_seconds=5e-6)
        for rows in shapes
    )
    machine = Machine("m", 1, 1e10, ((1.0, 1e10),), ffn_curves=curves)
    # A dozen tokens of a tiny model may take no hot expert at all, which would say nothing of their cost.
    hot_share = np.linspace(0, 1, experts.count + 1)
    units.text = Text((), [hot_share ** (0.5 + 0.1 * index) for index in range(len(units.shape.layers))])
    counts = units.hot_counts()
    assert counts == sorted(set(counts))
    assert 3 <= len(counts) <= 5
    assert 0 < counts[0] < counts[-1] < experts.count
    grid = Grid(units)
    cases = {case: units.hot(case.share) for case in grid.cases()}
    assert list(cases.values()) == [counts[0], counts[-1], 0, *counts[1:-1]]
    parts = {hot: units.parts("dense", hot, machine) for hot in (0, *counts)}
    packed = [sum(matrix.packed_nbytes for matrix in rows) / 2e9 + 5e-6 for rows in shapes]
    plain = sum(matrix.nbytes for matrix in layer.ffn)
    for hot, part in parts.items():
        cold = hot_bytes = waits = 0.0
        for index in range(profile.layers):
            share = float(units.text.choices[index][hot])
            hot_bytes += experts.used * share * plain
            cold += experts.used * (1 - share) * packed[0] + sum(packed[1:])
            waits += 1 - (1 - share) ** experts.used
        shares = [np.sort(profile.counts(index))[::-1] for index in range(profile.layers)]
        expected = np.mean([counted[:hot].sum() / counted.sum() for counted in shares])
        assert units.expected_choices(hot) == pytest.approx(expected, abs=1e-12)
        assert part.cold_seconds == pytest.approx(cold, rel=1e-9)
        assert part.hot_work == pytest.approx(hot_bytes, rel=1e-9, abs=1e-12)
        assert part.waits == pytest.approx(waits, rel=1e-9, abs=1e-12)
    for per_byte, per_wait in ((1e-9, 2e-5), (1e-9, 0.0), (0.0, 2e-5)):
        samples = {
            case: [3e-4 + part.cold_seconds + per_byte * part.hot_work + per_wait * part.waits] * 3
            for case, part in ((case, parts[hot]) for case, hot in cases.items())
        }
        slow = counts[1]
        late = Case("cpu", "dense", slow / experts.count)
        samples[late] = [2 * seconds for seconds in samples[late]]
        found = grid.verification(samples, 3e-4, machine)
        assert [row.hot_share * experts.count for row in found.rows] == pytest.approx([0, *counts[1:-1]])
        for row in found.rows:
            wanted = -0.5 if row.hot_share == slow / experts.count else 0.0
            assert row.error == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize("case", ["mixtral", "qwen2moe"])
def test_budgets_place_the_experts_that_a_row_says(case: str, tmp_path: Path) -> None:
    prepared = PreparedExperts(tmp_path, case)
    count, shared = prepared.routing.experts, prepared.routing.shared_neurons > 0
    split = prepared.split([count] * prepared.layers, [False] * prepared.layers if shared else None)
    for hot in (1, 2, count - 1):
        model = load_model(split)
        budget = vram_of(model, hot)
        engine = Engine(model, threads=1, context=64, batch=BATCH, device="cpu", vram=budget)
        try:
            side = engine.stack._hot
            assert side is not None
            assert [len(side.hot_experts(layer)) for layer in range(prepared.layers)] == [
                hot
            ] * prepared.layers
        finally:
            engine.close()


def test_measured_choices_are_those_of_the_tokens_that_are_timed(made: Profiled) -> None:
    units, profile = made.units(), Profile.load(made.profile)
    layers = units.shape.layers
    count = experts_of(layers[0]).count
    seen = [counters(count, histogram=False) for _ in layers]
    engine = Engine(load_model(made.model), threads=1, context=64, observed=seen)
    try:
        engine.prefill(units.text.tokens[:PROMPT])
        before = [layer.counts.copy() for layer in seen]
        for token in units.text.tokens[PROMPT:]:
            engine.decode(token)
    finally:
        engine.close()
    for hot in (0, 1, count):
        for index, layer in enumerate(seen):
            taken = layer.counts - before[index]
            busiest = sorted(range(len(layer.counts)), key=lambda e: -int(profile.counts(index)[e]))[:hot]
            share = taken[busiest].sum() / taken.sum()
            assert units.text.choices[index][hot] == pytest.approx(share, abs=1e-12)


def test_splits_have_one_form_of_rows(made: Profiled, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's CPU device unpacks what is small, once: never some splits of the grid, and others not."""
    units = made.units()
    layers = units.shape.layers
    values = len(layers) * sum(matrix.rows * matrix.columns for matrix in layers[0].ffn)
    whole = units.hot_counts()
    for limit in range(1, experts_of(layers[0]).count + 1):
        monkeypatch.setattr("powerinfer_tools.engine.hot.assembly.UNPACKED_LIMIT", 4 * values * limit + 1)
        counts = units.hot_counts()
        assert len({hot <= limit for hot in counts}) <= 1
        assert not counts or (whole[0] <= counts[0] and counts[-1] <= whole[-1])
    monkeypatch.setattr(verified_units, "torch_version", lambda: None)
    assert units.shares() == []
