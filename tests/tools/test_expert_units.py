"""Mixtures of experts whose attention, KV cache, routers and head are on the hot device, too.

No GPU is needed: a device here is torch's CPU device, or one that a test makes up.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_logits import greedy, logits, of_engine
from expert_models import PreparedExperts
from fake_gpus import FailingGpu, FakeGpu, LatestGpu, on
from powerinfer_kernels import triton_launch
from powerinfer_tools.engine import Engine
from powerinfer_tools.engine.hot.faults import DeviceLost
from powerinfer_tools.engine.hot.opening import planned_units
from powerinfer_tools.engine.hot.placement import Workload, attention_bytes, experts_of, units_size
from powerinfer_tools.model.device_memory import MARGIN, budget_for
from powerinfer_tools.model.loading import load_model
from powerinfer_tools.model.reference import forward
from tiny_models import CASES

KV_TYPES = ("f16", "q8_0")
EVERY = range(3)


@pytest.fixture(scope="module", params=["mixtral", "qwen2moe", "qwen3moe"])
def exact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreparedExperts:
    """Weights of single precision, and heads that either KV cache holds."""
    spec = replace(CASES[request.param], heads=2, kv_heads=1, head_dim=32)
    return PreparedExperts(tmp_path_factory.mktemp("exact"), spec)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> PreparedExperts:
    """With a shared expert, single precision."""
    return PreparedExperts(tmp_path_factory.mktemp("shared"), "qwen2moe")


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> PreparedExperts:
    """Quantised experts beside a router of single precision: the input is needed in both forms."""
    return PreparedExperts(tmp_path_factory.mktemp("quantised"), "mixtral-Q4_0")


@pytest.mark.parametrize("kv_type", KV_TYPES)
def test_any_placement_chooses_the_tokens_of_the_dense_model(exact: PreparedExperts, kv_type: str) -> None:
    tokens, experts, layers = exact.tiny.tokens(6), exact.routing.experts, exact.layers
    expected = greedy(exact.tiny.path, tokens, 8, kv_type=kv_type)

    @settings(max_examples=8, derandomize=True, deadline=None)
    @given(
        st.lists(st.integers(0, experts), min_size=layers, max_size=layers),
        st.lists(st.booleans(), min_size=layers, max_size=layers),
        st.sets(st.sampled_from(range(layers))),
        st.booleans(),
        st.sampled_from([1, 4, 512]),
    )
    def check(hot: list[int], places: list[bool], attention: set[int], head: bool, batch: int) -> None:
        path = exact.split(
            hot, places if exact.routing.shared_neurons else None, sorted(attention), head=head
        )
        assert greedy(path, tokens, 8, device="cpu", kv_type=kv_type, batch=batch) == expected

    check()


def placements(prepared: PreparedExperts) -> list[Path]:
    """The stream comes and goes: layers with attention there are neighbours of layers without, with all, some
    and no experts hot."""
    experts, layers = prepared.routing.experts, prepared.layers
    hot = [(experts // 2, experts, 0)[index % 3] for index in range(layers)]
    some = [index % 2 == 0 for index in range(layers)] if prepared.routing.shared_neurons else None
    return [
        prepared.split(hot, some, range(layers), head=True),
        prepared.split(hot, some, range(0, layers, 2)),
        prepared.split(hot[::-1], some, range(1, layers), head=True),
        prepared.split(*prepared.all_hot, range(layers), head=True),
        prepared.split([0] * layers, None, range(layers)),
    ]


def worst(prepared: PreparedExperts) -> float:
    """Largest error of logits against float64, in parts of their root mean square; prompts in pieces, then
    single tokens."""
    tokens, found = prepared.tiny.tokens(18), []
    expected = forward(load_model(prepared.tiny.path), tokens, half_cache=True)[11:]
    for path in placements(prepared):
        got = logits(path, tokens, prompt=12, device="cpu", batch=5)
        found.append(float(np.sqrt(np.mean((got - expected) ** 2) / np.mean(expected**2))))
    return max(found)


def test_logits_are_those_of_the_reference_wherever_units_are(exact: PreparedExperts) -> None:
    """Within the bound of layers of neurons: see test_hot_units."""
    assert worst(exact) <= 2.0**-10


def test_logits_of_quantised_experts_are_those_of_the_reference(quantised: PreparedExperts) -> None:
    assert worst(quantised) <= 0.01 * np.sqrt(7 * quantised.layers + 1)


def test_a_cache_of_bytes_keeps_the_same(exact: PreparedExperts) -> None:
    """Both sides round keys and values alike: see test_hot_units."""
    path, tokens = exact.split([1] * exact.layers, attention=EVERY), exact.tiny.tokens(18)
    expected, half = (logits(path, tokens, kv_type=kind) for kind in reversed(KV_TYPES))
    got = logits(path, tokens, kv_type="q8_0", device="cpu")
    assert np.abs(got - expected).max() <= 2.0**-9 * np.abs(expected).max()
    assert np.abs(got - expected).max() < 0.5 * np.abs(half - expected).max()


def test_a_layer_costs_one_wait_and_the_stream_stays(
    shared: PreparedExperts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything is done at the latest moment that is allowed, and in order: each layer waits for what its
    router says, wherever its experts are, and the logits end the pass."""
    tokens, experts = shared.tiny.tokens(12), shared.routing.experts
    path = shared.split([2, experts, 0], [False, True, True], EVERY, head=True)
    expected = logits(path, tokens, device="cpu", batch=5)
    gpu = LatestGpu()
    on(monkeypatch, gpu)
    engine = Engine(load_model(path), threads=1, device="cuda", batch=5)
    assert engine.report().memory.kv_cache == 0
    engine.prefill(tokens[:1])
    gpu.stops.clear()
    engine.decode(tokens[1])
    assert len(gpu.stops) == shared.layers + 1
    engine.close()
    on(monkeypatch, LatestGpu())
    assert np.array_equal(logits(path, tokens, device="cuda", batch=5), expected)


def test_a_trace_shows_both_sides_and_no_sum_where_there_is_none(shared: PreparedExperts) -> None:
    experts = shared.routing.experts
    path = shared.split([experts, 0, 0], [True, True, False], [0, 1], head=True)
    engine = Engine(load_model(path), threads=1, device="cpu")
    engine.prefill(shared.tiny.tokens(3))
    timeline = engine.trace()
    engine.decode(1)
    report = engine.report()
    engine.close()
    there = [(event.name, event.layer) for event in timeline.events if event.track == "hot side"]
    start = ["attention"] * 3 + ["hot", "router", "copy out"]
    # Everything of layer 0 is there: neither its input nor a sum passes.
    assert [name for name, layer in there if layer == 0] == [*start, "copy in", "hot", "merge"]
    assert [name for name, layer in there if layer == 1] == [
        *start, "copy out", "copy in", "hot", "copy in", "merge",
    ]  # fmt: skip
    assert not [name for name, layer in there if layer == 2]
    here = [(event.name, event.layer) for event in timeline.events if event.track == "CPU"]
    assert [name for name, layer in here if layer == 0] == ["launch", "wait", "route", "launch"]
    assert sorted(name for name, layer in here if layer == 1) == [
        "experts", "launch", "launch", "route", "wait",
    ]  # fmt: skip
    assert {name for name, layer in here if layer == 2} >= {"attention", "router", "ffn"}
    assert report.overlap is not None


def test_the_budget_covers_weights_cache_and_scratch_up_front(
    exact: PreparedExperts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Less takes experts first, then the head, then attention blocks, and the last two are said."""
    path, tokens = exact.split(*exact.all_hot, EVERY, head=True), exact.tiny.tokens(12)
    units, work = planned_units(load_model(path)), Workload(5, 40)
    size = units_size(load_model(path), units, work)
    assert size.cache == 3 * 2 * 40 * 32 * 2
    options = {"threads": 1, "batch": 5, "context": 40}
    expected = of_engine(Engine(load_model(path), **options), tokens)  # type: ignore[arg-type]
    whole, blocks = size.total, units_size(load_model(path), units.without_ffns, work).total
    taken = []
    for room, said in (
        (whole, ""),
        (whole - 1, ""),
        (blocks + (whole - blocks) // 2, ""),
        (blocks - 1, "hot experts, not its output head fit in the"),
        (1 << 19, "attention blocks, not its output head fit in the"),
    ):
        gpu, budget = FakeGpu(1 << 30), budget_for(room)
        on(monkeypatch, gpu)
        engine = Engine(load_model(path), device="cuda", vram=budget, **options)  # type: ignore[arg-type]
        assert [said in notice for notice in engine.notices] == [True] * bool(said)
        taken.append(engine.report().memory.vram or 0)
        assert taken[-1] <= room
        got = of_engine(engine, tokens)
        assert len(gpu.asked) <= 1
        assert all(asked <= budget for asked in gpu.asked)
        # Keys and values tip to a neighbour in half precision: see test_hot_units.
        assert np.abs(got - expected).max() <= 2.0**-9 * np.abs(expected).max()
    assert taken == sorted(taken, reverse=True)
    assert len(set(taken)) == len(taken)
    assert taken[0] == whole


def test_what_does_not_fit_in_what_is_free_stays_on_the_cpu(
    shared: PreparedExperts, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = shared.split([1, 2, 3], None, EVERY, head=True)
    model = load_model(path)
    size = units_size(model, planned_units(model).without_ffns, Workload(5, 256))
    on(monkeypatch, FakeGpu(free=MARGIN + budget_for(size.total - model.head.nbytes - 1000)))
    engine = Engine(load_model(path), threads=1, device="cuda", batch=5)
    engine.close()
    assert ["of the plan's 6 hot experts, not its output head fit" in said for said in engine.notices] == [
        True
    ]


def test_bytes_of_a_token_count_everything_there_once(shared: PreparedExperts) -> None:
    """Attention, routers and head are read whole, experts as far as they are taken: rows are not padded."""
    path = shared.split(*shared.all_hot, EVERY, head=True)
    engine = Engine(load_model(path), threads=1, device="cpu")
    engine.prefill([1])
    engine.decode(2)
    counted, model = engine.report().bytes_per_token, engine.model
    engine.close()
    layers = experts_of(model)
    taken = sum(shared.routing.used * layer.expert_nbytes + layer.shared_nbytes for layer in layers)
    blocks = sum(attention_bytes(model, index) for index in range(len(model.layers)))
    cache = 2 * shared.layers * 2 * model.hyper.kv_width * 2  # of two positions, in half precision
    row = model.embedding.nbytes // model.embedding.rows
    assert counted == taken + blocks + model.head.nbytes + model.output_norm.nbytes + cache + row


def test_fused_kernels_beside_a_router_that_has_none(
    quantised: PreparedExperts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In Triton's interpreter: single tokens go through the fused kernels, prompts through unpacked rows."""
    path, tokens = quantised.split([4, 0], None, [0]), quantised.tiny.tokens(3)
    expected = logits(path, tokens, prompt=2, batch=2, context=8)
    on(monkeypatch, FakeGpu(1 << 30), fused=True)
    products: list[int] = []
    matvec, matvecs = triton_launch.matvec, triton_launch.matvecs
    monkeypatch.setattr(triton_launch, "matvec", lambda *a: (products.append(a[1].rows), matvec(*a))[1])
    monkeypatch.setattr(
        triton_launch, "matvecs", lambda *a: (products.extend(m.rows for m in a[1]), matvecs(*a))[1]
    )
    engine = Engine(load_model(path), threads=1, device="cuda", batch=2, context=8)
    assert list(engine.notices) == []  # a router of single precision is read as it is
    got = of_engine(engine, tokens)
    width = quantised.tiny.spec.width
    assert products.count(width) == 2  # queries, and attention's output; experts have kernels of their own
    assert np.abs(got - expected).max() <= 0.02 * np.abs(expected).max()


@pytest.mark.parametrize("when", ["submit", "wait"])
def test_a_lost_device_takes_its_cache_along_which_is_an_error(
    shared: PreparedExperts, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    path, tokens = shared.split([2, 2, 2], None, [1]), shared.tiny.tokens(18)
    on(monkeypatch, FailingGpu(9, when=when))
    with pytest.raises(DeviceLost, match="the KV cache in its memory is lost; begin again"):
        logits(path, tokens, device="cuda")


def test_a_lost_device_gives_experts_and_head_back(
    shared: PreparedExperts, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, tokens = shared.split([2, 2, 2], [True] * 3, head=True), shared.tiny.tokens(6)
    expected = logits(path, tokens, device="cpu")
    for last in (6, 8):  # amid the layers, and at the head
        on(monkeypatch, FailingGpu(last, when="wait"))
        engine = Engine(load_model(path), threads=1, device="cuda")
        got = of_engine(engine, tokens, prompt=3)
        assert len(engine.notices) == 1
        assert np.array_equal(got, expected)
