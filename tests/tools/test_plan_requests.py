"""Plans for requests: what a prompt takes by the formula, and placements that are best for all of one."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from plan_cases import NEURONS_ONLY, expert_shape, machine, shape
from powerinfer_formats.hardware import CpuInfo, GpuInfo, HardwareProfile, LinkInfo, MachineInfo
from powerinfer_formats.plan import Plan
from powerinfer_tools.errors import PlanError
from powerinfer_tools.model.shapes import ModelShape
from powerinfer_tools.stages.plan import render_plan
from powerinfer_tools.stages.plan.capabilities import ALL_PLACED, Capabilities
from powerinfer_tools.stages.plan.costs import Machine
from powerinfer_tools.stages.plan.frequencies import Frequencies
from powerinfer_tools.stages.plan.milp import SolverOptions
from powerinfer_tools.stages.plan.planner import Budgets, Outcome, PlanOptions, plan_outcome
from powerinfer_tools.stages.plan.prompts import CPU_MACS_PER_CORE, GPU_MACS_PER_BYTE
from powerinfer_tools.stages.plan.request import make_plan

GENERATE = 10


def outcome(
    model: ModelShape,
    on: Machine,
    prompt: int,
    vram: int | None = None,
    *,
    batch: int = 16,
    engine: Capabilities = ALL_PLACED,
) -> Outcome:
    options = PlanOptions(
        solver=SolverOptions(gap=0.0),
        context=1024,
        batch=batch,
        engine=engine,
        prompt=prompt,
        generate=GENERATE,
        group=256,
    )
    return plan_outcome(model, Frequencies(None, "none"), on, Budgets(vram), options)


@pytest.mark.parametrize(("cores", "bound"), [(1, "arithmetic"), (1000, "bandwidth")])
def test_a_prompt_on_the_cpu_takes_bytes_or_arithmetic(cores: int, bound: str) -> None:
    """40 tokens in batches of 16 are three passes over the weights."""
    model = shape(2, neurons=512, width=256)
    result = outcome(model, replace(machine(vram=None), cores=cores), 40)
    table = result.placement.tables[0]
    ffn, attention = 3 * 512 * 256, (256 + 128 + 128 + 256) * 256
    if bound == "arithmetic":
        expected = 40 * (ffn + attention + 4 * 64 * 40) / CPU_MACS_PER_CORE
    else:
        expected = 3 * (512 * result.sizes[0].total + attention * 20 / 32 + 8 * 256) / 2e10
    assert table.prompt_seconds[0] == pytest.approx(expected, rel=1e-9)
    assert outcome(model, machine(vram=None), 0).placement.prompt_seconds == 0


def test_experts_of_a_batch_are_read_once() -> None:
    model, each = expert_shape(1, experts=8, used=2), 3 * 128 * 160
    on = replace(machine(vram=None), cores=10**6)
    table = outcome(model, on, 40).placement.tables[0]
    rest = model.layers[0]
    attention = sum(m.packed_nbytes for m in rest.attention) + rest.vector_bytes
    assert table.prompt_seconds[0] == pytest.approx(3 * (8 * each + attention) / 2e10, rel=1e-9)


def test_the_accelerator_takes_the_prompt_of_what_is_hot() -> None:
    model = shape(1, neurons=512, width=256)
    on = machine(launch=0, sync=1e-6)
    table = outcome(model, on, 40, 1 << 30).placement.tables[0]
    level = next(k for k in range(len(table)) if table.hot[k] == 512 and not table.block_hot[k])
    macs, rate = 3 * 512 * 256, GPU_MACS_PER_BYTE * 5e11
    ffn = max(3 * macs * 20 / 32 / 5e11, 40 * macs / rate)
    attention = 40 * ((256 + 128 + 128 + 256) * 256 + 4 * 64 * 40) / CPU_MACS_PER_CORE
    carried = 3 * (1e-6 + 2e-7) + 2 * 4 * 256 * 40 / 1e10
    assert table.prompt_seconds[level] == pytest.approx(ffn + attention + carried, rel=1e-9)


@pytest.mark.parametrize("prompt", [0, 1, 40, 4000])
def test_the_plan_is_best_for_the_request(prompt: int) -> None:
    model = shape(2, neurons=512, width=256)
    result = outcome(model, machine(sync=5e-6), prompt, (128 << 20) + 600_000)
    tables, placement = result.placement.tables, result.placement
    request = placement.prompt_seconds + GENERATE * placement.seconds
    assert GENERATE * placement.solution.value == pytest.approx(request, rel=1e-9)
    used = sum(int(t.vram[k]) for t, k in zip(tables, placement.solution.choice, strict=True))
    for choice in itertools.product(*(range(len(table)) for table in tables)):
        pairs = list(zip(tables, choice, strict=True))
        if sum(int(t.vram[k]) for t, k in pairs) <= used:
            seconds = sum(float(t.prompt_seconds[k] + GENERATE * t.seconds[k]) for t, k in pairs)
            assert request <= seconds * (1 + 1e-9)
    for value in placement.greedy.values():
        assert value is None or placement.solution.value <= value


def test_a_prompt_changes_what_is_best() -> None:
    """The CPU computes single tokens nearly as fast, and batches at a hundredth of the rate."""
    model, on = shape(2, neurons=512, width=256), machine(sync=1e-3)
    alone, request = (
        outcome(model, on, prompt, 1 << 30, batch=512, engine=NEURONS_ONLY) for prompt in (0, 4000)
    )
    assert alone.memory.vram_used == 0
    assert request.memory.vram_units["ffn"] > 0
    assert (
        request.placement.prompt_seconds
        < 0.95 * outcome(model, on, 4000, 0, batch=512, engine=NEURONS_ONLY).placement.prompt_seconds
    )


def test_file_report_and_refusals(tmp_path: Path) -> None:
    model = shape(2, neurons=512, width=256)
    cpu = CpuInfo("a CPU", 2, "avx2", 2e10, 1 << 34, (1.0,), (2e10,))
    gpu = GpuInfo("a GPU", 1 << 30, 5e11, 1e-6, 1e-5)
    hardware = HardwareProfile(MachineInfo("here", "measured", "2026-11-30"), cpu, gpu, LinkInfo(1e10, 1e-6))
    options = PlanOptions(context=1024, prompt=1000, generate=300)
    plan = make_plan(model, None, hardware, Budgets(), options)
    assert plan.request is not None
    assert plan.request.seconds == pytest.approx(
        plan.request.prompt_seconds + 300 / plan.predicted.tokens_per_second
    )
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    text = render_plan(plan)
    assert f"a request of 1,000 tokens and 300 generated: {plan.request.seconds:.1f} s\n" in text
    for name in ("cpu only", "whole layers", "FFNs on the CPU"):
        assert f"{name} " in text
    assert "s a request" in text
    plain = make_plan(model, None, hardware, Budgets(), replace(options, prompt=0))
    assert "request" not in plain.to_document()
    for wrong in ({"prompt": -1}, {"generate": 0}):
        with pytest.raises(PlanError, match="cannot be priced"):
            make_plan(model, None, hardware, Budgets(), replace(options, **wrong))  # type: ignore[arg-type]
    assert np.isfinite(plan.request.seconds)
