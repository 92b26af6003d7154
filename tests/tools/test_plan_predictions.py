"""Speeds that a plan is compared with, and what better hardware would bring."""

from dataclasses import replace
from pathlib import Path

import pytest

from plan_cases import NEURONS_ONLY, granted, machine, shape
from powerinfer_tools.errors import PowerInferError
from powerinfer_tools.measure.hardware.presets import PC_LOW
from powerinfer_tools.stages.plan.frequencies import Frequencies
from powerinfer_tools.stages.plan.memory import Workload, gpu_attention_scratch_bytes, gpu_scratch_bytes
from powerinfer_tools.stages.plan.milp import SolverOptions
from powerinfer_tools.stages.plan.picture import draw_predictions
from powerinfer_tools.stages.plan.planner import Budgets, PlanOptions, plan_outcome
from powerinfer_tools.stages.plan.predictions import predictions, sensitivity
from powerinfer_tools.stages.plan.request import make_plan

OPTIONS = PlanOptions(solver=SolverOptions(gap=0.0), context=1024, engine=NEURONS_ONLY)
UNKNOWN = Frequencies(None, "nothing is known")
#: Bytes of a neuron of width 256: gate and up in Q4_1, down in Q8_0.
NEURON = 2 * 160 + 272


def test_predictions_beside_the_plan_follow_their_formulas() -> None:
    """Room for one whole layer of four beside the scratch: it goes to the GPU, the head stays."""
    model = shape(4, 128)
    layer_bytes = 768 * 160 + 8 * 256 + 128 * NEURON
    whole = layer_bytes + 2 * 2 * 2 * 64 * 1024
    vram = gpu_scratch_bytes(model, 512) + gpu_attention_scratch_bytes(model, Workload(1024)) + whole + 100
    result = plan_outcome(model, UNKNOWN, machine(), granted(vram), OPTIONS)
    found = predictions(result)
    assert list(found) == ["powerinfer", "layer-offload", "cpu"]
    assert found["powerinfer"].tokens_per_second == 1 / result.placement.seconds
    read = 768 * 160 + 8 * 256 + 2 * 2 * 64 * 2 * 512
    head = 1008 * 272 / 2e10
    cpu = 4 * (read + 128 * NEURON) / 2e10 + head
    assert found["cpu"].seconds["total"] == pytest.approx(cpu, rel=1e-12)
    gpu = (read + 128 * NEURON) / 5e11 + 8 * 1e-7 + 1e-6 + 2 * (1e-7 + 4 * 256 / 1e10)
    offload = 3 * (read + 128 * NEURON) / 2e10 + head + gpu
    assert found["layer-offload"].seconds["total"] == pytest.approx(offload, rel=1e-12)
    for prediction in found.values():
        parts = sum(value for name, value in prediction.seconds.items() if name != "total")
        assert parts == pytest.approx(prediction.seconds["total"], rel=1e-12)


def test_better_hardware_is_never_slower_and_faster_memory_scales_the_cpu() -> None:
    model = shape(4, 512)
    for vram in (None, 6 << 20):
        on, budgets = machine(vram=None if vram is None else 1 << 32), granted(vram)
        base = 1 / plan_outcome(model, UNKNOWN, on, budgets, OPTIONS).placement.seconds
        better = sensitivity(model, UNKNOWN, on, budgets, OPTIONS)
        assert ("vram_plus_1_gib" in better) == (vram is not None)
        assert all(speed >= base for speed in better.values())
        if vram is None:
            assert better["ram_bandwidth_times_1.25"] == pytest.approx(1.25 * base, rel=1e-12)


@pytest.mark.parametrize(("ending", "start"), [(".svg", b"<?xml"), (".png", b"\x89PNG")])
def test_picture_has_a_bar_for_every_prediction(ending: str, start: bytes, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="charts need matplotlib: pip install matplotlib")
    plan = make_plan(shape(4, 128), None, PC_LOW, Budgets(), OPTIONS)
    path = tmp_path / f"plan{ending}"
    draw_predictions(plan, path)
    content = path.read_bytes()
    assert content.startswith(start)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    if ending == ".svg":
        for name, prediction in plan.predictions.items():
            assert f"<!-- {name} -->".encode() in content
            assert f"{prediction.tokens_per_second:.1f} tok/s".encode() in content
    with pytest.raises(PowerInferError, match=r"written as \.png or \.svg"):
        draw_predictions(plan, tmp_path / "plan.gif")


def test_a_shape_has_the_speed_of_a_lesser_version_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shape is planned with every unit placed; a model by what this version can do. Where that is the same,
    nothing has to stand beside."""
    model = replace(shape(4, 2048), fingerprint="ab" * 32)
    plans = [make_plan(made, None, PC_LOW, Budgets(), OPTIONS) for made in (shape(4, 2048), model)]
    for plan in plans:
        assert list(plan.predictions) == ["powerinfer", "layer-offload", "cpu"]
        assert (plan.provenance.engine, plan.provenance.predictors) == ("this version", "none")
    for module in ("request", "plan_file", "verdict"):
        monkeypatch.setattr(f"powerinfer_tools.stages.plan.{module}.THIS_VERSION", NEURONS_ONLY)
    plan = make_plan(shape(4, 2048), None, PC_LOW, Budgets(), OPTIONS)
    found = {name: prediction.tokens_per_second for name, prediction in plan.predictions.items()}
    assert list(found) == ["powerinfer", "layer-offload", "cpu", "powerinfer-this-version"]
    assert found["powerinfer"] >= found["powerinfer-this-version"] >= found["cpu"]
    assert plan.provenance.engine == "every unit placed"
    assert "powerinfer-this-version" in plan.verdict
    of_model = make_plan(model, None, PC_LOW, Budgets(), OPTIONS)
    assert of_model.provenance.engine == "this version"
    assert of_model.predictions["powerinfer"].tokens_per_second == found["powerinfer-this-version"]
