"""Plans whose third tier is the disk: budgets kept, the best of all choices, times by the formulas, words."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from expert_models import PreparedExperts
from plan_cases import NEURONS_ONLY, expert_shape, granted, machine, routing_frequencies, shape
from powerinfer_formats.errors import BadField
from powerinfer_formats.hardware import CpuInfo, DiskInfo, HardwareProfile, MachineInfo
from powerinfer_formats.plan import Plan
from powerinfer_kernels import Pool
from powerinfer_tools.engine import from_disk, weights
from powerinfer_tools.engine.from_disk import FromDisk, RamOptions
from powerinfer_tools.engine.residency import Residency
from powerinfer_tools.engine.weights_on_disk import Budget
from powerinfer_tools.errors import PlanError
from powerinfer_tools.model.loading import Model, load_model
from powerinfer_tools.model.shapes import ModelShape, neuron_bytes, shape_of_model
from powerinfer_tools.stages.plan import PlanRequest, render_plan, verification_from_disk
from powerinfer_tools.stages.plan.costs import Disk, Machine
from powerinfer_tools.stages.plan.disk_levels import buffer_bytes
from powerinfer_tools.stages.plan.frequencies import Frequencies
from powerinfer_tools.stages.plan.memory import expert_bytes
from powerinfer_tools.stages.plan.milp import SolverOptions
from powerinfer_tools.stages.plan.planner import Budgets, Outcome, PlanOptions, plan_outcome
from powerinfer_tools.stages.plan.request import make_plan, plan_request
from powerinfer_tools.stages.plan.verdict import time_parts, verdict
from powerinfer_tools.stages.plan.verification_from_disk import verify_from_disk

#: Bytes of an expert of `expert_shape`: two matrices of 128 rows of 256 in Q4_1, and one of 256 rows of 128.
MATRIX = 128 * 160
EXPERT = 3 * MATRIX
DISK = Disk(((4096, 1e8), (MATRIX, 5e8), (1 << 20, 1e9)))


def outcome(
    model: ModelShape, ram: int, *, on: Machine, vram: int | None = None, **options: object
) -> Outcome:
    chosen = PlanOptions(solver=SolverOptions(gap=0.0), context=1024, batch=16, engine=NEURONS_ONLY)
    known = Frequencies(routing_frequencies(model, 0), "made up")
    return plan_outcome(model, known, on, Budgets(vram, ram), replace(chosen, **options))  # type: ignore[arg-type]


def with_disk(*, gpu: bool = False) -> Machine:
    return replace(machine(vram=1 << 30 if gpu else None), disk=DISK)


def room(model: ModelShape, experts: int) -> int:
    """RAM for the model with so many of its experts, and for reading the others."""
    whole = outcome(model, 1 << 30, on=with_disk())
    count = sum(layer.experts.count for layer in model.layers if layer.experts)
    return whole.memory.ram_used - (count - experts) * EXPERT + buffer_bytes(model)


def test_what_does_not_fit_is_on_disk_within_the_budget() -> None:
    model, speeds = expert_shape(4, experts=16, used=2), []
    for experts in (8, 20, 40):
        ram = room(model, experts)
        made = outcome(model, ram, on=with_disk())
        assert ram - made.memory.ram_used < 4 * EXPERT
        assert made.memory.ram_used <= ram
        assert made.memory.disk_used == made.placement.disk_bytes >= (64 - experts) * EXPERT
        assert made.memory.ram_units["disk_buffers"] == buffer_bytes(model)
        speeds.append(1 / made.placement.seconds)
    assert speeds == sorted(speeds)
    fits = outcome(model, 1 << 30, on=with_disk())
    assert (fits.memory.disk_used, "disk_buffers" in fits.memory.ram_units) == (0, False)
    assert speeds[-1] <= 1 / fits.placement.seconds


def test_times_are_the_slower_of_disk_and_computing() -> None:
    model = expert_shape(3, experts=16, used=2)
    made = outcome(model, room(model, 12), on=with_disk())
    known = routing_frequencies(model, 0)
    for index, (table, k) in enumerate(
        zip(made.placement.tables[:-1], made.placement.solution.choice, strict=False)
    ):
        resident = 16 - int(table.disk[k]) // EXPERT
        read = float(known[index][resident:].sum()) * EXPERT / 5e8
        assert table.disk_seconds[k] == pytest.approx(read, rel=1e-9)
        assert table.seconds[k] == max(table.computing_seconds[k], table.disk_seconds[k])
    parts = time_parts(made)
    assert parts["disk"] > 0
    assert sum(parts.values()) == pytest.approx(made.placement.seconds, rel=1e-12)


@pytest.mark.parametrize("gpu", [False, True])
def test_the_plan_is_the_best_of_all_choices(gpu: bool) -> None:
    model = expert_shape(2, experts=8, used=2)
    made = outcome(model, room(model, 7), on=with_disk(gpu=gpu), vram=0 if gpu else None)
    tables, best = made.placement.tables, np.inf
    left = made.memory.ram_capacity - sum(
        size
        for name, size in made.memory.ram_units.items()
        if name not in ("ffn", "attention", "kv_cache", "head", "router")
    )
    for choice in itertools.product(*(range(len(table)) for table in tables)):
        pairs = list(zip(tables, choice, strict=True))
        fits = sum(int(table.ram[k]) for table, k in pairs) <= left
        if fits and not any(table.vram[k] for table, k in pairs):
            best = min(best, sum(float(table.seconds[k]) for table, k in pairs))
    assert made.placement.seconds == pytest.approx(best, rel=1e-9)


def test_an_accelerator_takes_some_ram_some_and_the_disk_the_rest() -> None:
    model = expert_shape(4, experts=16, used=2)
    ram = room(model, 16)
    without = outcome(model, ram, on=with_disk())
    made = outcome(model, ram, on=with_disk(gpu=True), vram=(128 << 20) + 40 * EXPERT)
    assert made.memory.vram_used <= made.memory.vram_capacity
    assert made.memory.ram_used <= ram
    assert made.memory.vram_units["ffn"] > 0
    assert made.memory.disk_used < without.memory.disk_used
    assert made.placement.seconds < without.placement.seconds


def test_what_cannot_be_read_from_disk_says_why() -> None:
    model = expert_shape(4, experts=16, used=2)
    with pytest.raises(PlanError, match=r"the model does not fit.*doctor --measure -m"):
        outcome(model, room(model, 20), on=machine(vram=None))
    with pytest.raises(PlanError, match="the model does not fit"):
        outcome(model, room(model, 0) - buffer_bytes(model), on=with_disk())
    dense = shape(4, 4096)
    options = PlanOptions(context=1024, batch=16, engine=NEURONS_ONLY)
    with pytest.raises(PlanError, match=r"no locality .* Beside an accelerator nothing of it is read"):
        plan_outcome(
            dense, Frequencies(None, "none"), with_disk(gpu=True), granted(2_500_000, 6 << 20), options
        )


def test_a_dense_model_passes_through_memory() -> None:
    """As many FFNs as fit are in memory; a token takes as long as the disk brings the others."""
    model = shape(8, 4096)
    options = PlanOptions(context=1024, batch=16, engine=NEURONS_ONLY, solver=SolverOptions(gap=0.0))
    known, ffn = Frequencies(None, "none"), 4096 * neuron_bytes(model.layers[0]).total
    whole = plan_outcome(model, known, with_disk(), Budgets(None, 1 << 30), options)
    for stays in (0, 1, 3):
        ram = whole.memory.ram_used + buffer_bytes(model) - (8 - stays) * ffn
        made = plan_outcome(model, known, with_disk(), Budgets(None, ram), options)
        assert made.memory.ram_used <= ram
        assert made.memory.disk_used == (8 - stays) * ffn
        reading = (8 - stays) * 3 * 4096 * 160 / DISK.bandwidth(256 << 10)
        assert sum(
            float(t.disk_seconds[k])
            for t, k in zip(made.placement.tables, made.placement.solution.choice, strict=True)
        ) == pytest.approx(reading, rel=1e-9)
        assert f"The FFNs of {8 - stays} of 8 layers are on disk alone" in verdict(made)
        assert "A dense model has no locality" in verdict(made)


def hardware() -> HardwareProfile:
    cpu = CpuInfo("a CPU", 2, "avx2", 2e10, 1 << 34, (1.0,), (2e10,))
    reads = tuple(rate / size for size, rate in DISK.rates)
    disk = DiskInfo("/models", True, 1e9, tuple(size for size, _ in DISK.rates), reads, reads)
    return HardwareProfile(MachineInfo("here", "measured", "2026-11-30"), cpu, disk=disk)


def test_the_file_and_the_report(tmp_path: Path) -> None:
    model = expert_shape(4, experts=16, used=2)
    options = PlanOptions(context=1024, batch=16)
    ram = outcome(model, 1 << 30, on=with_disk()).memory.ram_used + buffer_bytes(model)
    plan = make_plan(model, None, hardware(), Budgets(None, ram - 40 * EXPERT), options)
    assert plan.version == 3
    assert plan.memory.disk_used == sum(layer.disk_bytes for layer in plan.layers) > 0
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert set(plan.predictions) == {"powerinfer", "all-in-memory"}
    speed = plan.predicted.tokens_per_second
    assert plan.predictions["all-in-memory"].tokens_per_second >= plan.sensitivity["ram_plus_1_gib"] > speed
    text = render_plan(plan)
    row = next(line.split() for line in text.splitlines() if line.startswith("on disk alone"))
    assert row[3:] == ["0", f"{plan.memory.disk_used:,}"]
    assert "with 1 GiB more RAM" in text
    assert "all-in-memory" in text
    assert "experts are on disk alone: if all are taken equally often, a token reads" in text
    wrong = replace(plan, memory=replace(plan.memory, disk_used=1))
    with pytest.raises(BadField, match="disk_used"):
        wrong.save(tmp_path / "wrong.json")
    fits = make_plan(model, None, hardware(), Budgets(None, ram), options)
    assert fits.version == 2
    assert "disk" not in str(fits.to_document())


def test_measured_beside_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = PreparedExperts(tmp_path, "qwen3moe")
    hardware().save(tmp_path / "hardware.toml")
    request = PlanRequest(made.tiny.path, profile=made.profile, hardware=str(tmp_path / "hardware.toml"))
    whole = plan_request(request).memory.ram_used
    each = expert_bytes(shape_of(made.tiny.path).layers[0]).ram
    asked = list[float]()

    def opened(model: Model, pool: Pool, options: RamOptions, *, batch: int, **_: object) -> FromDisk:
        residency = Residency(model, pool)
        asked.append(float(options.ram or 0))
        use, _ = from_disk.expert_frequencies(model, options)
        nbytes = residency.readers_bytes + residency.whole_bytes // 2 + 1
        return FromDisk(residency, Budget(nbytes, 1, use), ())

    monkeypatch.setattr(weights, "open_from_disk", opened)
    monkeypatch.setattr(verification_from_disk, "_DECODED", 6)
    ram = whole - each
    found = verify_from_disk(replace(request, ram_bytes=ram, threads=1))
    assert asked == [ram, ram + plan_request(replace(request, ram_bytes=ram)).memory.disk_used // 2]
    assert [row.device for row in found.rows] == ["disk", "disk"]
    assert 0 < found.rows[0].hot_share < found.rows[1].hot_share <= 1
    for row in found.rows:
        assert row.predicted_choices is not None
        assert row.hot_share <= row.predicted_choices <= 1
        assert 0 < row.measured_choices < 1  # type: ignore[operator]
        assert 0 < row.predicted_seconds < 60
        assert 0 < row.measured_seconds < 60
    with pytest.raises(PlanError, match="nothing is read from disk"):
        verify_from_disk(replace(request, ram_bytes=2 * whole))


def shape_of(path: Path) -> ModelShape:
    model = load_model(path)
    try:
        return shape_of_model(model)
    finally:
        model.close()
