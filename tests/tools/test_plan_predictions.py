"""Speeds that a plan is compared with, and what better hardware would bring."""

import pytest

from plan_cases import machine, shape
from powerinfer_tools.planning.frequencies import Frequencies
from powerinfer_tools.planning.memory import gpu_scratch_bytes
from powerinfer_tools.planning.milp import SolverOptions
from powerinfer_tools.planning.planner import Budgets, PlanOptions, plan_outcome
from powerinfer_tools.planning.predictions import predictions, sensitivity

OPTIONS = PlanOptions(solver=SolverOptions(gap=0.0), context=1024)
UNKNOWN = Frequencies(None, "nothing is known")
#: Bytes of a neuron of width 256: gate and up in Q4_1, down in Q8_0.
NEURON = 2 * 160 + 272


def test_predictions_beside_the_plan_follow_their_formulas() -> None:
    """Room for one whole layer of four beside the scratch: it goes to the GPU, the head stays."""
    model = shape(4, 128)
    layer_bytes = 768 * 160 + 8 * 256 + 128 * NEURON
    whole = layer_bytes + 2 * 2 * 2 * 64 * 1024
    vram = gpu_scratch_bytes(model, 512) + whole + 100
    result = plan_outcome(model, UNKNOWN, machine(), Budgets(vram), OPTIONS)
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
        on, budgets = machine(vram=None if vram is None else 1 << 32), Budgets(vram)
        base = 1 / plan_outcome(model, UNKNOWN, on, budgets, OPTIONS).placement.seconds
        better = sensitivity(model, UNKNOWN, on, budgets, OPTIONS)
        assert ("vram_plus_1_gib" in better) == (vram is not None)
        assert all(speed >= base for speed in better.values())
        if vram is None:
            assert better["ram_bandwidth_times_1.25"] == pytest.approx(1.25 * base, rel=1e-12)
