"""Split files of experts in the engine: the source's bits on the CPU, hot experts on any device.

No GPU is needed: a device here is torch's CPU device with other memory, another queue, or a fault.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_logits import HALF, greedy, of_engine
from expert_models import PreparedExperts
from fake_gpus import MIB, FailingGpu, FakeGpu, LatestGpu, on
from meetings import Meeting
from powerinfer_cli.convert_command import show
from powerinfer_formats.gguf_reader import GGUFFile
from powerinfer_formats.plan import Plan
from powerinfer_formats.profile import Profile
from powerinfer_formats.split import SplitFile
from powerinfer_formats.split_layout import experts_name
from powerinfer_kernels import available_isas, triton_launch
from powerinfer_tools.engine import Engine, from_disk
from powerinfer_tools.engine import layers as layer_stack
from powerinfer_tools.engine import memory as memory_limits
from powerinfer_tools.engine.hot import opening
from powerinfer_tools.engine.hot.experts import HotExperts
from powerinfer_tools.engine.hot.placement import Workload, experts_of, units_size
from powerinfer_tools.errors import ConvertError, HardwareError, ModelError, PlanError, ProfileError
from powerinfer_tools.inspect.describe import describe
from powerinfer_tools.model.device_memory import MARGIN, budget_for
from powerinfer_tools.model.loading import load_model
from powerinfer_tools.model.reference import forward
from powerinfer_tools.model.shapes import shape_of_model
from powerinfer_tools.stages.convert.conversion import ConvertOptions, convert
from powerinfer_tools.stages.plan import memory
from powerinfer_tools.stages.profile import ProfileOptions, run_profile

F32_BOUND = 2000 * np.finfo(np.float32).eps


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> PreparedExperts:
    """With a shared expert, single precision."""
    return PreparedExperts(tmp_path_factory.mktemp("shared"), "qwen2moe")


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> PreparedExperts:
    return PreparedExperts(tmp_path_factory.mktemp("quantised"), "mixtral-Q4_0")


@pytest.fixture(scope="module", params=["mixtral", "qwen2moe", "qwen3moe"])
def exact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreparedExperts:
    """Weights of single precision, so that placements differ in the order of sums alone."""
    return PreparedExperts(tmp_path_factory.mktemp("exact"), request.param)


def some_hot(prepared: PreparedExperts) -> Path:
    """Different in every layer, with none and all among them."""
    experts, count = prepared.routing.experts, prepared.layers
    hot = [(experts // 2, 0, experts)[index % 3] for index in range(count)]
    places = [index % 2 == 0 for index in range(count)] if prepared.routing.shared_neurons else None
    return prepared.split(hot, places)


def everything_hot(prepared: PreparedExperts) -> Path:
    places = [True] * prepared.layers if prepared.routing.shared_neurons else None
    return prepared.split([prepared.routing.experts] * prepared.layers, places)


def test_any_plan_chooses_the_tokens_of_the_dense_model(exact: PreparedExperts) -> None:
    tokens, experts = exact.tiny.tokens(6), exact.routing.experts
    expected = greedy(exact.tiny.path, tokens, 8)
    counts = st.lists(st.integers(0, experts), min_size=exact.layers, max_size=exact.layers)
    places = st.lists(st.booleans(), min_size=exact.layers, max_size=exact.layers)

    @settings(max_examples=6, derandomize=True, deadline=None)
    @given(counts, places)
    def check(hot: list[int], shared_hot: list[bool]) -> None:
        path = exact.split(hot, shared_hot if exact.routing.shared_neurons else None)
        assert greedy(path, tokens, 8) == expected
        assert greedy(path, tokens, 8, device="cpu", batch=4) == expected

    check()


def test_any_split_has_the_sources_bits_on_the_cpu(
    quantised: PreparedExperts, shared: PreparedExperts
) -> None:
    for prepared in (quantised, shared):
        tokens = prepared.tiny.tokens(8)
        expected = of_engine(Engine(load_model(prepared.tiny.path), threads=1), tokens)
        for path in (some_hot(prepared), everything_hot(prepared)):
            for options in ({"threads": 2}, *({"isa": isa} for isa in available_isas())):
                got = of_engine(Engine(load_model(path), **({"threads": 1} | options)), tokens)  # type: ignore[arg-type]
                assert np.array_equal(got, expected)


def test_the_hot_side_agrees_with_the_reference(exact: PreparedExperts) -> None:
    """In float64, over the split file's own order of experts; prompts in pieces, then single tokens."""
    path, tokens = some_hot(exact), exact.tiny.tokens(7)
    expected = forward(load_model(exact.tiny.path), tokens)[1:]
    np.testing.assert_array_equal(forward(load_model(path), tokens)[1:], expected)
    got = of_engine(Engine(load_model(path), threads=1, device="cpu"), tokens)
    # Keys and values are in half precision in the engine: see test_forward.
    assert np.abs(got - expected).max() <= 2 * exact.layers * HALF * np.abs(expected).max()
    cold = of_engine(Engine(load_model(path), threads=1), tokens)
    assert np.abs(got - cold).max() <= F32_BOUND * np.abs(expected).max()
    assert np.array_equal(got, of_engine(Engine(load_model(path), threads=1, device="cpu"), tokens))


def test_quantised_experts_on_the_hot_side(
    quantised: PreparedExperts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hot side does not round hidden values, and rounding may flip: see test_conversion."""
    path, tokens = some_hot(quantised), quantised.tiny.tokens(6)
    expected = of_engine(Engine(load_model(path), threads=1), tokens)
    got = of_engine(Engine(load_model(path), threads=1, device="cpu"), tokens)
    assert np.abs(got - expected).max() <= 0.02 * np.abs(expected).max()
    on(monkeypatch, FakeGpu(1 << 30))  # rows as in the file, unpacked chunk by chunk
    unpacked = of_engine(Engine(load_model(path), threads=1, device="cuda", batch=2, context=8), tokens)
    assert np.abs(unpacked - got).max() <= 0.02 * np.abs(expected).max()


@pytest.mark.parametrize("case", ["mixtral-Q4_0", "qwen2moe-Q8_0"])
def test_fused_kernels_compute_a_tokens_experts_at_once(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In Triton's interpreter, beside torch's CPU device; one of the two models has shared experts. What no
    token takes may be NaN."""
    prepared = PreparedExperts(tmp_path, case)
    tokens, none = prepared.tiny.tokens(3), [0] * (prepared.layers - 1)
    shared = [True, *[False] * len(none)] if prepared.routing.shared_neurons else None
    path = prepared.split([prepared.routing.experts - 1, *none], shared)
    expected = of_engine(Engine(load_model(path), threads=1, device="cpu"), tokens)
    poisoned(prepared, path, tmp_path / "p.gguf", tokens)
    launched: list[int] = []
    sums = triton_launch.expert_sums
    monkeypatch.setattr(triton_launch, "expert_sums", lambda *a: (launched.append(len(a[0])), sums(*a))[1])
    on(monkeypatch, FakeGpu(1 << 30), fused=True)
    engine = Engine(load_model(tmp_path / "p.gguf"), threads=1, device="cuda", batch=2, context=8)
    got = of_engine(engine, tokens)
    assert launched == [prepared.routing.used] * (len(tokens) - 2)
    assert np.abs(got - expected).max() <= 0.02 * np.abs(expected).max()


def poisoned(prepared: PreparedExperts, path: Path, output: Path, tokens: list[int]) -> int:
    """``path`` with NaN in place of every expert that ``tokens`` do not take; how many those are."""
    from test_routed import counters, decoded

    seen = [counters(prepared.routing.experts, histogram=False) for _ in range(prepared.layers)]
    decoded(prepared.tiny.path, tokens, seen)
    data, split, idle = np.frombuffer(path.read_bytes(), np.uint8).copy(), SplitFile.open(path), 0
    for layer, counted in enumerate(seen):
        for position, expert in enumerate(split.orders[layer].tolist()):
            if counted.counts[expert]:
                continue
            idle += 1
            for kind in ("gate", "up", "down"):
                info = split.gguf.info(experts_name(layer, kind))
                size = info.nbytes // prepared.routing.experts
                data[info.offset + position * size : info.offset + (position + 1) * size] = 0xFF
    output.write_bytes(data.tobytes())
    return idle


def test_experts_that_no_token_takes_are_never_read(exact: PreparedExperts, tmp_path: Path) -> None:
    """Hot or cold, their weights may be NaN."""
    path, tokens = some_hot(exact), exact.tiny.tokens(2)
    assert poisoned(exact, path, tmp_path / "p.gguf", tokens) > exact.layers // 2
    for device in ("none", "cpu"):
        expected = of_engine(Engine(load_model(path), threads=1, device=device), tokens)
        got = of_engine(Engine(load_model(tmp_path / "p.gguf"), threads=1, device=device), tokens)
        assert np.array_equal(got, expected)
        other = exact.tiny.tokens(30)
        engine = Engine(load_model(tmp_path / "p.gguf"), threads=1, device=device)
        with pytest.raises(ModelError, match="holds NaN or infinity"):
            of_engine(engine, other)


def test_one_wait_for_each_layer_with_hot_work_and_no_other_order_is_relied_on(
    shared: PreparedExperts, monkeypatch: pytest.MonkeyPatch
) -> None:
    hot = [shared.routing.experts, 0, 0]
    path, tokens = shared.split(hot, [False, True, False]), shared.tiny.tokens(5)
    expected = of_engine(Engine(load_model(path), threads=1, device="cpu"), tokens)
    gpu = LatestGpu()
    on(monkeypatch, gpu)
    got = of_engine(Engine(load_model(path), threads=1, device="cuda"), tokens)
    assert np.abs(got - expected).max() <= F32_BOUND * np.abs(expected).max()
    forwards = 1 + len(tokens) - 2
    assert len(gpu.stops) == 2 * forwards  # the third layer has nothing hot


def test_tokens_without_hot_experts_wait_for_nothing(
    exact: PreparedExperts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The busiest expert of each layer is hot: not every token takes it."""
    path, tokens = exact.split([1] * exact.layers), exact.tiny.tokens(12)
    gpu = LatestGpu()
    on(monkeypatch, gpu)
    got = of_engine(Engine(load_model(path), threads=1, device="cuda"), tokens)
    assert 0 < len(gpu.stops) < exact.layers * (1 + len(tokens) - 2)
    expected = of_engine(Engine(load_model(path), threads=1), tokens)
    assert np.abs(got - expected).max() <= F32_BOUND * np.abs(expected).max()


def test_both_sides_work_at_once_and_the_timeline_says_so(
    shared: PreparedExperts, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    meeting, compute = Meeting(), HotExperts.compute
    monkeypatch.setattr(HotExperts, "compute", lambda *a: (meeting(), compute(*a))[1])
    path = shared.split([0] * shared.layers, [True] * shared.layers)
    engine = Engine(load_model(path), threads=1, device="cpu")
    stack = engine.stack
    engine.prefill(shared.tiny.tokens(2))
    run, met = stack.run, set[int]()

    def meeting_run(first: int, last: int, *rest: int) -> None:
        layer = next((i for i, stop in enumerate(stack._stops) if stop.ready <= first < stop.needed), None)
        if layer is not None and layer not in met:
            met.add(layer)
            meeting()
        run(first, last, *rest)

    monkeypatch.setattr(stack, "run", meeting_run)
    timeline = engine.trace()
    meeting.open = True
    engine.decode(3)
    report = engine.report()
    engine.close()
    assert meeting.count == shared.layers
    assert report.overlap is not None
    assert report.timings["hot"] > 0
    events = {(event.name, event.layer): event for event in timeline.events}
    for layer in range(shared.layers):
        hot_event, cold_event = events["hot", layer], events["experts", layer]
        assert min(hot_event.end, cold_event.end) > max(hot_event.start, cold_event.start)
    timeline.write(tmp_path / "trace.json")
    rows = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {row["name"] for row in rows if row["ph"] == "X"}
    assert names >= {"router", "launch", "experts", "wait", "copy in", "hot", "copy out"}


def test_memory_is_allocated_up_front_within_the_budget(
    quantised: PreparedExperts, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(everything_hot(quantised))
    whole = units_size(model, opening.planned_units(model), Workload(4, 16))
    shape = shape_of_model(load_model(quantised.tiny.path))
    assert whole.scratch == memory.gpu_scratch_bytes(shape, 4)
    one = experts_of(model)[0].expert_nbytes
    assert whole.weights == one * quantised.routing.experts * quantised.layers
    gpu = FakeGpu(free=1 << 30)
    on(monkeypatch, gpu)
    budget = budget_for(whole.scratch + 4 * one)
    engine = Engine(model, threads=1, device="cuda", vram=budget, batch=4, context=16)
    hot = [len(engine.stack._hot.hot_experts(i)) for i in range(quantised.layers)]  # type: ignore[union-attr]
    assert sum(hot) == 4
    assert max(hot) - min(hot) <= 1
    assert len(gpu.asked) == 1
    assert gpu.asked[0] <= budget
    assert engine.report().memory.vram == whole.scratch + 4 * one
    of_engine(engine, quantised.tiny.tokens(6))
    assert len(gpu.asked) == 1


def test_budgets_that_do_not_fit_are_refused_or_the_split_moves(
    shared: PreparedExperts, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = everything_hot(shared)
    gpu = FakeGpu(free=200 * MIB)
    on(monkeypatch, gpu)
    with pytest.raises(HardwareError, match="--vram 201 MiB: the GPU has 200 MiB free"):
        Engine(load_model(path), threads=1, device="cuda", vram=201 * MIB)
    assert not gpu.asked
    model = load_model(path)
    scratch = units_size(model, opening.planned_units(model), Workload(4, 16)).scratch
    room = 2 * experts_of(model)[0].shared_nbytes
    on(monkeypatch, FakeGpu(free=MARGIN + budget_for(scratch + room)))
    engine = Engine(load_model(path), threads=1, device="cuda", batch=4, context=16)
    # Shared experts, which every token takes, go last.
    assert [engine.stack._hot.hot_experts(i) for i in range(3)] == [{-1}, {-1}, set()]  # type: ignore[union-attr]
    engine.close()
    assert any("2 of the plan's 21 hot experts fit in the" in notice for notice in engine.notices)
    expected = of_engine(Engine(load_model(path), threads=1), shared.tiny.tokens(4))
    none = Engine(load_model(path), threads=1, device="cpu", vram=0)
    assert none.report().device == "none"
    assert np.array_equal(of_engine(none, shared.tiny.tokens(4)), expected)


def test_what_is_on_a_gpu_needs_no_ram(shared: PreparedExperts, monkeypatch: pytest.MonkeyPatch) -> None:
    path = everything_hot(shared)
    weights = sum(info.nbytes for info in load_model(path).source.tensors.values())
    for module in (from_disk, layer_stack):
        monkeypatch.setattr(module, "available_ram_bytes", lambda: memory_limits.MARGIN + weights)
    refused = {"none": "are left for experts", "cpu": "KV cache for a context of 16 do not fit"}
    for device, reason in refused.items():
        with pytest.raises(ModelError, match=reason):
            Engine(load_model(path), threads=1, device=device, context=16)
    on(monkeypatch, FakeGpu(1 << 30))
    Engine(load_model(path), threads=1, device="cuda", context=16).close()


@pytest.mark.parametrize("problem", ["no device", "no memory"])
def test_without_a_usable_gpu_the_cpu_computes_everything_which_is_said_once(
    shared: PreparedExperts, monkeypatch: pytest.MonkeyPatch, problem: str
) -> None:
    path, tokens = everything_hot(shared), shared.tiny.tokens(4)
    expected = of_engine(Engine(load_model(shared.tiny.path), threads=1), tokens)
    if problem == "no device":
        monkeypatch.setattr(opening, "cuda_problem", lambda: "torch finds no GPU that it can use")
    else:
        on(monkeypatch, FakeGpu(free=1 << 30, largest=5))
    engine = Engine(load_model(path), threads=1, device="cuda")
    assert engine.report().device == "none"
    assert np.array_equal(of_engine(engine, tokens), expected)
    said = "torch finds no GPU" if problem == "no device" else "out of VRAM at the start: "
    assert [said in notice and "computed on the CPU" in notice for notice in engine.notices] == [True]


@pytest.mark.parametrize("when", ["submit", "wait"])
def test_a_gpu_that_disappears_is_replaced_by_the_cpu_which_is_said_once(
    shared: PreparedExperts, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    path, tokens = everything_hot(shared), shared.tiny.tokens(5)
    expected = of_engine(Engine(load_model(path), threads=1, device="cpu"), tokens)
    on(monkeypatch, FailingGpu(shared.layers + 2, when=when))
    engine = Engine(load_model(path), threads=1, device="cuda")
    got = of_engine(engine, tokens)
    assert np.abs(got - expected).max() <= F32_BOUND * np.abs(expected).max()
    assert len(engine.notices) == 1
    assert "the GPU stopped working (an illegal thing" in engine.notices[0]


def test_bytes_of_a_token_count_experts_of_both_sides_once(quantised: PreparedExperts) -> None:
    taken = []
    for path, device in ((quantised.tiny.path, "none"), (some_hot(quantised), "cpu")):
        engine = Engine(load_model(path), threads=1, device=device)
        engine.prefill([1])
        engine.decode(2)
        taken.append(engine.report().bytes_per_token)
        engine.close()
    assert taken[1] == pytest.approx(taken[0], rel=0.02)  # packed rows are padded, those in VRAM are not


# --- convert -----------------------------------------------------------------------------------------


def test_convert_sorts_experts_by_count_and_keeps_every_bit(shared: PreparedExperts) -> None:
    report = shared.convert([2, 6, 0], [True, False, True])
    split, profile = SplitFile.open(report.output), Profile.load(shared.profile)
    source = GGUFFile.open(shared.tiny.path)
    assert report.experts is not None
    assert (report.experts.count, report.experts.hot, report.experts.hot_shared) == (
        6,
        (2, 6, 0),
        (True, False, True),
    )
    assert report.hot_neurons == (2 * shared.neurons, 6 * shared.neurons, 0)
    assert not any(report.requantization_error)
    assert split.header.source_fingerprint == load_model(shared.tiny.path).fingerprint
    assert split.header.corpus_tokens == profile.tokens
    for layer in range(shared.layers):
        order = split.orders[layer]
        assert order.tolist() == profile.order(layer).tolist()
        for kind in ("gate", "up", "down"):
            written = split.gguf.tensor(experts_name(layer, kind)).reshape(6, -1)
            read = source.tensor(f"blk.{layer}.ffn_{kind}_exps.weight").reshape(6, -1)
            assert np.array_equal(written, read[order])
    rest = {name for name in source.tensors if "_exps." not in name}
    assert rest == {n for n in split.gguf.tensors if "_experts." not in n and not n.endswith("expert_order")}
    for name in rest:
        assert np.array_equal(split.gguf.tensor(name), source.tensor(name))
    for key, value in source.metadata.items():
        if key != "general.alignment":
            assert str(split.gguf.metadata[key]) == str(value)


def test_inspect_tells_what_is_hot(shared: PreparedExperts, capsys: pytest.CaptureFixture[str]) -> None:
    report = shared.convert([2, 6, 0], [True, False, True], attention=[1, 2], head=True)
    facts = describe(Path(report.output))
    assert [layer["attention_device"] for layer in facts.facts["layers"]] == ["cpu", "gpu", "gpu"]
    assert facts.facts["head_device"] == report.as_dict()["devices"]["head"] == "gpu"
    show(report, as_json=False)
    assert "attention of 2 layers, the head" in "".join(capsys.readouterr())
    assert facts.kind == "split file"
    assert facts.facts["hot_share"] == pytest.approx(8 / 18)
    assert [layer["hot_experts"] for layer in facts.facts["layers"]] == [2, 6, 0]
    assert [layer["shared_expert"] for layer in facts.facts["layers"]] == ["hot", "cold", "hot"]
    assert sorted(facts.facts["layers"][0]["hottest"]) == list(range(6))


def test_what_convert_refuses(shared: PreparedExperts, quantised: PreparedExperts, tmp_path: Path) -> None:
    plan, output = tmp_path / "p.json", tmp_path / "out.gguf"

    def attempt(made: Plan, profile: Path = shared.profile, **options: object) -> None:
        made.save(plan)
        chosen = ConvertOptions(shared.tiny.path, profile, plan, output)
        convert(replace(chosen, **options))  # type: ignore[arg-type]

    good = shared.plan([1, 2, 3])
    for options in ({"quant": "Q8_0"}, {"predictors": tmp_path / "x"}, {"thresholds": tmp_path / "x"}):
        with pytest.raises(ConvertError, match="experts are placed as wholes and keep the source's bits"):
            attempt(good, **options)
    with pytest.raises(ConvertError, match="was made for"):
        attempt(good, quantised.profile)
    other = quantised.plan([1] * quantised.layers)
    model = replace(other.model, fingerprint=good.model.fingerprint)
    with pytest.raises(ConvertError, match=r"the plan has \d+ experts of \d+ neurons in .* plan again"):
        attempt(replace(other, model=model))
    profile = Profile.load(shared.profile)
    replace(profile, activation="relu").save(tmp_path / "neurons")
    with pytest.raises(ConvertError, match="the profile counts relu in 3 layers, not the experts of 3"):
        attempt(good, tmp_path / "neurons")
    assert not output.exists()


def test_weights_that_are_not_finite_are_named(shared: PreparedExperts, tmp_path: Path) -> None:
    data = bytearray(shared.tiny.path.read_bytes())
    info = GGUFFile.open(shared.tiny.path).info("blk.1.ffn_down_exps.weight")
    data[info.offset + 8 : info.offset + 12] = b"\xff\xff\xff\xff"
    damaged, plan = tmp_path / "m.gguf", shared.plan([1, 2, 3])
    damaged.write_bytes(data)
    fingerprint = load_model(damaged).fingerprint
    replace(Profile.load(shared.profile), fingerprint=fingerprint).save(tmp_path / "p")
    replace(plan, model=replace(plan.model, fingerprint=fingerprint)).save(tmp_path / "plan")
    options = ConvertOptions(damaged, tmp_path / "p", tmp_path / "plan", tmp_path / "out.gguf")
    with pytest.raises(ConvertError, match=r"blk\.1\.ffn_down_exps\.weight has a value that is not finite"):
        convert(options)
    assert not options.output.exists()


def test_stages_that_start_from_a_source_refuse_a_split_file(shared: PreparedExperts, tmp_path: Path) -> None:
    path = some_hot(shared)
    with pytest.raises(PlanError, match="this is a split file"):
        shape_of_model(load_model(path))
    with pytest.raises(ConvertError, match="is a split file already"):
        convert(ConvertOptions(path, shared.profile, tmp_path / "p", tmp_path / "o"))
    (tmp_path / "t.txt").write_text("a text")
    with pytest.raises(ProfileError, match="split file"):
        run_profile(ProfileOptions(path, (tmp_path / "t.txt",), tmp_path / "o"))
    with pytest.raises(ModelError, match="experts run in mode dense alone"):
        Engine(load_model(path), mode="gate-first")
    with pytest.raises(HardwareError, match="is not a split file, so no part of it can be placed on cpu"):
        Engine(load_model(shared.tiny.path), device="cpu")
