"""A plan that is made fits when it is run: planner and hot side count the same memory."""

from dataclasses import replace

import pytest

from expert_models import PreparedExperts
from fake_gpus import FakeGpu, on
from powerinfer_cli.convert_command import show
from powerinfer_formats.hardware import HardwareProfile
from powerinfer_formats.profile import Profile
from powerinfer_tools.engine import Engine
from powerinfer_tools.engine.hot.opening import planned_units
from powerinfer_tools.engine.hot.placement import Workload, fit, units_size
from powerinfer_tools.inspect import describe
from powerinfer_tools.measure.hardware.presets import PC_LOW
from powerinfer_tools.model.device_memory import OVERHEAD, budget_for, overhead
from powerinfer_tools.model.loading import Model, load_model
from powerinfer_tools.model.shapes import shape_of_model
from powerinfer_tools.stages.convert.conversion import ConvertOptions, convert
from powerinfer_tools.stages.plan.planner import Budgets, PlanOptions
from powerinfer_tools.stages.plan.request import make_plan
from split_models import GROUP, Prepared

BATCH, CONTEXT = 16, 48


def keen() -> HardwareProfile:
    """A machine whose GPU is worth any hand-over."""
    assert PC_LOW.gpu is not None
    assert PC_LOW.link is not None
    cpu = replace(
        PC_LOW.cpu, bandwidth_bytes_per_s=1e6, sparse_densities=(1.0,), sparse_bandwidth_bytes_per_s=(1e6,)
    )
    gpu = replace(PC_LOW.gpu, launch_seconds=0.0, sync_seconds=0.0)
    return replace(PC_LOW, cpu=cpu, gpu=gpu, link=replace(PC_LOW.link, latency_seconds=0.0))


@pytest.fixture(scope="module", params=["llama-untied", "gemma3", "opt", "falcon-relu", "llama-Q4_1"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return Prepared(tmp_path_factory.mktemp("fits"), request.param)


def runs_within(budget: int, opened: Model, tokens: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device with no more than ``budget`` bytes, taken at once, and nothing has to be said."""
    gpu = FakeGpu(free=budget)
    on(monkeypatch, gpu)
    engine = Engine(opened, threads=1, device="cuda", vram=budget, batch=BATCH, context=CONTEXT)
    assert list(engine.notices) == []
    assert len(gpu.asked) == 1
    assert gpu.asked[0] <= budget
    engine.prefill(tokens)
    engine.close()


def test_what_is_planned_is_what_is_placed(
    model: Prepared, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = load_model(model.tiny.path)
    shape, profile = shape_of_model(source), Profile.load(model.profile)
    source.close()
    options = PlanOptions(group=GROUP, context=CONTEXT, batch=BATCH)
    whole = make_plan(shape, profile, keen(), Budgets(1 << 30), options)
    assert all(layer.attention == "gpu" for layer in whole.layers)
    assert all(layer.hot_neurons == model.neurons for layer in whole.layers)
    there = {unit.name for unit in whole.units if unit.device == "gpu"}
    assert there == {"attention", "kv_cache", "head", "scratch", "reserve"}
    placed = set()
    needed = whole.memory.vram_used - overhead(whole.memory.vram_capacity)
    for share in (1.0, 0.9, 0.75, 0.5):
        budget = budget_for(int(share * needed))
        plan = make_plan(shape, profile, keen(), Budgets(budget), options)
        assert plan.memory.vram_used <= budget
        path = model.folder / f"{share}.plan.json"
        plan.save(path)
        split = model.folder / f"{share}.powerinfer.gguf"
        report = convert(ConvertOptions(model.tiny.path, model.profile, path, split))
        opened = load_model(split)
        work, units = Workload(BATCH, CONTEXT), planned_units(opened)
        assert fit(opened, units, budget - overhead(budget), work) == units
        facts = describe(split).facts
        assert [layer["attention_device"] == "gpu" for layer in facts["layers"]] == list(units.attention)
        assert report.as_dict()["devices"]["head"] == facts["head_device"] == ("gpu" if units.head else "cpu")
        show(report, as_json=False)
        said = "".join(capsys.readouterr())
        moved = sum(units.attention)
        assert (f"attention of {moved} layers" in said) == (moved > 0)
        assert ("the head" in said) == units.head
        # The planner counts biases of neurons and tables that some layers do not need.
        assert 0 <= plan.memory.vram_used - overhead(budget) - units_size(opened, units, work).total <= 60_000
        runs_within(budget, opened, model.tiny.tokens(20), monkeypatch)
        placed.add((units.neurons, units.attention, units.head))
    assert len(placed) > 1


def test_the_margin_of_a_plan_without_budget_holds_what_the_engine_leaves_free() -> None:
    from powerinfer_tools.model.device_memory import MARGIN
    from powerinfer_tools.stages.plan.planner import VRAM_MARGIN

    assert VRAM_MARGIN >= 4 * MARGIN


@pytest.mark.parametrize("nbytes", [0, 1, 7, 8, 50, 1 << 20, 7 * OVERHEAD, 7 * OVERHEAD + 1, 1 << 40])
def test_a_budget_leaves_what_it_was_made_for(nbytes: int) -> None:
    budget = budget_for(nbytes)
    assert budget - overhead(budget) >= nbytes
    if nbytes:
        assert budget - 1 - overhead(budget - 1) < nbytes
    assert overhead(budget) <= min(OVERHEAD, budget // 8)


@pytest.fixture(scope="module", params=["mixtral-Q4_0", "qwen2moe", "qwen3moe"])
def experts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreparedExperts:
    return PreparedExperts(tmp_path_factory.mktemp("experts"), request.param)


def test_what_is_planned_of_experts_is_what_is_placed(
    experts: PreparedExperts, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = load_model(experts.tiny.path)
    shape, profile = shape_of_model(source), Profile.load(experts.profile)
    source.close()
    options = PlanOptions(context=CONTEXT, batch=BATCH)
    whole = make_plan(shape, profile, keen(), Budgets(1 << 30), options)
    assert all(layer.attention == "gpu" for layer in whole.layers)
    assert all(layer.hot_neurons == experts.neurons * experts.routing.experts for layer in whole.layers)
    there = {unit.name for unit in whole.units if unit.device == "gpu"}
    assert there == {"attention", "kv_cache", "router", "head", "scratch", "reserve"}
    placed, needed = set(), whole.memory.vram_used - overhead(whole.memory.vram_capacity)
    for share in (1.0, 0.9, 0.75, 0.5):
        budget = budget_for(int(share * needed))
        plan = make_plan(shape, profile, keen(), Budgets(budget), options)
        assert plan.memory.vram_used <= budget
        path, split = (experts.folder / f"{share}.{end}" for end in ("plan.json", "powerinfer.gguf"))
        plan.save(path)
        convert(ConvertOptions(experts.tiny.path, experts.profile, path, split))
        opened = load_model(split)
        work, units = Workload(BATCH, CONTEXT), planned_units(opened)
        assert fit(opened, units, budget - overhead(budget), work) == units
        assert [layer.attention == "gpu" for layer in plan.layers] == list(units.attention)
        found = [counts.experts * experts.neurons for counts in units.experts]
        assert [layer.hot_neurons for layer in plan.layers] == found
        assert [layer.shared_expert == "gpu" for layer in plan.layers] == [
            counts.shared for counts in units.experts
        ]
        left = plan.memory.vram_used - overhead(budget) - units_size(opened, units, work).total
        assert 0 <= left <= 2 * source.hyper.width * 4  # a bias that an output norm may have
        runs_within(budget, opened, experts.tiny.tokens(20), monkeypatch)
        placed.add((units.experts, units.attention, units.head))
    assert len(placed) > 1
