"""plan --verify: rows for a grid of splits and modes, predicted by the planner's cost model."""

from dataclasses import replace
from pathlib import Path

import pytest

from powerinfer_formats.hardware import CpuInfo, FFNCurve, HardwareProfile, MachineInfo
from powerinfer_formats.profile import Profile
from powerinfer_tools.model.loading import load_model
from powerinfer_tools.stages.plan import PlanRequest, make_plan, verification, verified_units
from powerinfer_tools.stages.plan.costs import Machine
from powerinfer_tools.stages.plan.verification import Case, Grid, verified, verify
from powerinfer_tools.stages.plan.verification_rows import VerifyRow
from powerinfer_tools.stages.profile import ProfileOptions, run_profile
from tiny_models import FAMILY_CASES, make_tiny_model

NEURONS, LAYERS = 160, 3


class Profiled:
    """A tiny model with its profile and a plan."""

    def __init__(self, folder: Path, family: str) -> None:
        self.model = make_tiny_model(folder, replace(FAMILY_CASES[family], seed=5)).path
        text = folder / "text.txt"
        text.write_text("the cat sat on the mat and the dog sat on the log; a quick brown fox jumps. " * 10)
        self.profile = folder / "t.profile.safetensors"
        run_profile(ProfileOptions(self.model, (text,), self.profile, window=64, threads=1))
        cpu = CpuInfo("a CPU", 1, "scalar", 1e10, 1 << 34, (1.0,), (1e10,))
        hardware = folder / "hardware.toml"
        HardwareProfile(MachineInfo("m", "measured", "2026-11-25"), cpu).save(hardware)
        self.plan = make_plan(PlanRequest(self.model, profile=self.profile, hardware=str(hardware)))


@pytest.fixture(scope="module")
def relu(tmp_path_factory: pytest.TempPathFactory) -> Profiled:
    return Profiled(tmp_path_factory.mktemp("verified"), "llama-relu")


@pytest.fixture(scope="module")
def ungated(tmp_path_factory: pytest.TempPathFactory) -> Profiled:
    return Profiled(tmp_path_factory.mktemp("verified"), "opt")


@pytest.mark.parametrize("which", ["relu", "ungated"])
def test_rows_are_measured_and_predicted(
    which: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: Profiled = request.getfixturevalue(which)
    monkeypatch.setattr(verification, "_ROUNDS", 1)
    monkeypatch.setattr(verified_units, "HOT_SHARES", (0.5,))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    found = verify(made.model, made.profile, made.plan, threads=1)
    assert [(row.device, row.mode, row.hot_share) for row in found.rows] == [
        ("none", "dense", 0.0),
        ("none", "gate-first", 0.0),
        ("cpu", "dense", 0.5),
        ("cpu", "gate-first", 0.5),
    ]
    for row in found.rows:
        assert 0 < row.predicted_seconds < 60
        assert 0 < row.measured_seconds < 60
        assert row.spread >= 0
    assert list(tmp_path.iterdir()) == []
    document = found.as_dict()
    assert document["median_error"] == found.median_error
    assert (
        document["rows"][0]["error"] == found.rows[0].predicted_seconds / found.rows[0].measured_seconds - 1
    )


def test_predictions_follow_the_cost_model(relu: Profiled) -> None:
    """Samples made of known parts: shared work, the curve's cold seconds, a hot side of so much per layer and
    per neuron. What follows the model has no error; what takes twice as long was predicted at half of it."""
    rates = ((0.01, 1.0), (3e9, 3e9), (1e9, 1e9))
    curve = FFNCurve(64, NEURONS, "F32", "F32", "F32", 2e9, *rates, overhead_seconds=5e-6)
    machine = Machine("m", 1, 1e10, ((1.0, 1e10),), ffn_curves=(curve,))
    model = load_model(relu.model)
    try:
        grid = Grid(verified(model, Profile.load(relu.profile)))
    finally:
        model.close()
    shared, per_layer, per_neuron = 3e-4, 2e-5, 1e-7
    samples = {}
    for case in grid.cases():
        hot = {0.0: 0, 0.125: 32, 0.25: 32, 0.5: 64, 0.75: 96, 0.875: 128}[case.share]
        assert grid.units.hot(case.share) == hot
        part = grid.parts(case, machine)
        seconds = shared + part.cold_seconds
        if case.mode == "dense":
            # Gate and up rows count whole, down rows of the active neurons, all at the rate of gate-first.
            active = sum(float(ffn.frequencies[hot:].sum()) for ffn in grid.units.ffns)
            cold = (LAYERS * (NEURONS - hot) * 2 + active) * 256 / 3e9 + LAYERS * 5e-6
            assert seconds == pytest.approx(shared + cold, rel=1e-12)
        assert (part.hot_work, part.waits) == (LAYERS * hot, LAYERS if hot else 0)
        if case.device == "cpu":
            seconds += LAYERS * (per_layer + per_neuron * hot)
        slow = 2.0 if (case.mode, case.share) == ("gate-first", 0.75) else 1.0
        samples[case] = [slow * seconds] * 3
    found = grid.verification(samples, shared, machine)
    assert len(found.rows) == 8
    for row in found.rows:
        wanted = -0.5 if (row.mode, row.hot_share) == ("gate-first", 0.75) else 0.0
        assert row.error == pytest.approx(wanted, abs=1e-9)
    assert found.median_error == pytest.approx(0, abs=1e-9)


def test_the_error_is_relative_to_what_was_measured() -> None:
    assert VerifyRow("none", "dense", 0.0, 1.1, 1.0, 0.0).error == pytest.approx(0.1)
    assert VerifyRow("none", "dense", 0.0, 0.8, 1.0, 0.0).error == pytest.approx(-0.2)


def test_an_ffn_without_gate_counts_with_its_own_curve(ungated: Profiled) -> None:
    """Two rows a neuron; what the activation reads streams, down rows are gathered."""
    grid = Grid(verified(load_model(ungated.model), Profile.load(ungated.profile)))
    types, spec = grid.units.ffns[0].sizes.types, grid.units.shape.layers[0]
    curve = FFNCurve(spec.width, spec.neurons, "none", *types, 2e9, (0.01, 1.0), (1e9, 1e9), (1e9, 1e9))
    machine = Machine("m", 1, 1e10, ((1.0, 1e10),), ffn_curves=(curve,))
    nbytes = LAYERS * spec.neurons * 2 * 4 * spec.width
    gate_first = grid.parts(Case("none", "gate-first", 0.0), machine).cold_seconds
    assert nbytes / 2 / 1e9 < gate_first < nbytes / 1e9
    # The sum of down rows leaves out zeros by itself: both do the same.
    assert grid.parts(Case("none", "dense", 0.0), machine).cold_seconds == gate_first
