"""Attention with its KV cache, and the head, on the hot device: torch's CPU device, which overlaps as a GPU
does and needs none."""

from pathlib import Path

import numpy as np
import pytest

from fake_gpus import FailingGpu, FakeGpu, LatestGpu, on
from meetings import Meeting
from powerinfer_kernels import triton_launch
from powerinfer_tools.engine import Engine, from_disk, layers, memory
from powerinfer_tools.engine.hot.faults import DeviceLost
from powerinfer_tools.engine.hot.hot_ffn import HotFFN
from powerinfer_tools.engine.hot.opening import planned_units
from powerinfer_tools.engine.hot.placement import Workload, units_size
from powerinfer_tools.errors import ModelError
from powerinfer_tools.model.device_memory import MARGIN, budget_for, overhead
from powerinfer_tools.model.loading import load_model
from powerinfer_tools.model.reference import forward
from split_models import GROUP, Prepared

#: Norms before and after, of single heads, biases, parallel blocks with one norm and with two, both kinds of
#: rotary pairs, learnt positions, windows, quantised rows.
FAMILIES = (
    "llama-wide-heads",
    "qwen2",
    "qwen3",
    "gemma3",
    "opt",
    "falcon-relu",
    "falcon-one-norm",
    "llama-Q4_1",
)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return Prepared(tmp_path_factory.mktemp("family"), request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return Prepared(tmp_path_factory.mktemp("llama"), "llama")


def logits(path: Path, tokens: list[int], **options: object) -> np.ndarray:
    """After a prompt of 12 in pieces of 5, each token that follows, and once more from the tenth on."""
    engine = Engine(load_model(path), **({"threads": 1, "batch": 5} | options))  # type: ignore[arg-type]
    try:
        rows = [engine.prefill(tokens[:12]).copy()]
        rows += [engine.decode(token).copy() for token in tokens[12:]]
        engine.rewind(9)
        rows.append(engine.prefill(tokens[9:13]).copy())
        return np.stack(rows)
    finally:
        engine.close()


def test_every_family_wherever_its_blocks_are(family: Prepared) -> None:
    """Against float64. The stream comes and goes: layers with attention there are neighbours of layers
    without, with all, some and no neurons hot."""
    layers, tokens = family.layers, family.tiny.tokens(18)
    hot = [(GROUP, family.neurons, 0)[index % 3] for index in range(layers)]
    paths = [
        family.split(hot, attention=range(layers), head=True),
        family.split(hot, attention=range(0, layers, 2)),
        family.split(hot[::-1], attention=range(1, layers), head=True),
    ]
    expected = forward(load_model(paths[0]), tokens, half_cache=True)
    expected = np.stack([*expected[11:], expected[12]])
    quantised = family.tiny.spec.row_type != "F32"
    for path in paths:
        got = logits(path, tokens, device="cpu")
        relative = np.sqrt(np.mean((got - expected) ** 2) / np.mean(expected**2))
        assert relative <= (0.01 * np.sqrt(7 * layers + 1) if quantised else 2.0**-10)


def test_a_cache_of_bytes_keeps_the_same(tmp_path: Path) -> None:
    """Both sides round keys and values alike; rotary frequencies are scaled one by one."""
    model = Prepared(tmp_path, "llama-3.1-rope")
    path, tokens = model.split([GROUP] * model.layers, attention=range(model.layers)), model.tiny.tokens(18)
    expected, half = logits(path, tokens, kv_type="q8_0"), logits(path, tokens)
    got = logits(path, tokens, kv_type="q8_0", device="cpu")
    # A flipped code is one part in 254 of 32 values; without the rounding, all of them are that far off.
    assert np.abs(got - expected).max() <= 2.0**-9 * np.abs(expected).max()
    assert np.abs(got - expected).max() < 0.5 * np.abs(half - expected).max()


def test_a_layer_costs_one_wait_and_the_stream_stays(
    llama: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything is done at the latest moment that is allowed, and in order: each layer with cold neurons
    waits for its input, a layer without waits for nothing, and the logits end the pass."""
    tokens, whole = llama.tiny.tokens(18), llama.neurons
    path = llama.split([GROUP, whole, GROUP], attention=range(3), head=True)
    expected = logits(path, tokens, device="cpu")
    gpu = LatestGpu()
    on(monkeypatch, gpu)
    engine = Engine(load_model(path), threads=1, device="cuda", batch=5)
    assert engine.report().memory.kv_cache == 0
    engine.prefill(tokens[:1])
    gpu.stops.clear()
    engine.decode(tokens[1])
    assert len(gpu.stops) == 2 + 1
    engine.close()
    on(monkeypatch, LatestGpu())
    assert np.array_equal(logits(path, tokens, device="cuda"), expected)


def test_a_trace_shows_both_sides(llama: Prepared) -> None:
    engine = Engine(
        load_model(llama.split([GROUP] * 3, attention=[0, 1], head=True)), threads=1, device="cpu"
    )
    engine.prefill(llama.tiny.tokens(3))
    timeline = engine.trace()
    engine.decode(1)
    engine.close()
    there = [(event.name, event.layer) for event in timeline.events if event.track == "hot side"]
    assert [name for name, layer in there if layer == 1] == [
        "attention", "attention", "attention", "hot", "copy out", "hot", "copy in", "merge",
    ]  # fmt: skip
    assert [name for name, layer in there if layer == 2] == ["copy in", "hot", "copy out"]
    assert [name for name, layer in there if layer is None] == [
        "copy in",
        "copy out",
        "copy in",
        "head",
        "copy out",
    ]
    here = [(event.name, event.layer) for event in timeline.events if event.track == "CPU"]
    assert [name for name, layer in here if layer == 0] == ["launch", "wait", "cold"]
    assert ("attention", 2) in here
    assert ("attention", 1) not in here


def test_the_budget_covers_weights_cache_and_scratch_up_front(
    llama: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = llama.split([llama.neurons] * 3, attention=range(3), head=True)
    model = load_model(path)
    units, work = planned_units(model), Workload(5, 40)
    size = units_size(model, units, work)
    assert size.cache == 3 * 2 * 40 * 2 * 16 * 2
    budget = budget_for(size.total)
    gpu = FakeGpu(free=1 << 30)
    on(monkeypatch, gpu)
    engine = Engine(model, threads=1, device="cuda", vram=budget, batch=5, context=40)
    assert engine.report().memory.vram == size.total
    assert len(gpu.asked) == 1
    assert gpu.asked[0] <= budget
    engine.prefill(llama.tiny.tokens(12))
    engine.close()
    assert len(gpu.asked) == 1
    # Less moves the split point first; below what the blocks need, the budget is refused with the numbers.
    less = budget_for(units_size(model, units.without_ffns, work).total)
    on(monkeypatch, FakeGpu(free=1 << 30))
    options = {"threads": 1, "device": "cuda", "batch": 5, "context": 40}
    smaller = less + size.weights // 4
    engine = Engine(load_model(path), vram=smaller, **options)  # type: ignore[arg-type]
    assert engine.report().memory.vram <= smaller - overhead(smaller)
    engine.close()
    for budget, said in (
        (less - 1, "not its output head fit"),
        (1 << 19, "0 of its 3 attention blocks, not its"),
    ):
        on(monkeypatch, FakeGpu(free=1 << 30))
        engine = Engine(load_model(path), vram=budget, **options)  # type: ignore[arg-type]
        assert (engine.report().memory.vram or 0) <= budget - overhead(budget)
        assert [said in notice for notice in engine.notices] == [True]
        engine.close()


def test_what_does_not_fit_in_what_is_free_stays_on_the_cpu(
    llama: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = llama.split([GROUP] * 3, attention=range(3), head=True)
    model = load_model(path)
    units, work = planned_units(model), Workload(5, 256)
    size = units_size(model, units.without_ffns, work)
    on(monkeypatch, FakeGpu(free=MARGIN + budget_for(size.total - model.head.nbytes - 1000)))
    engine = Engine(load_model(path), threads=1, device="cuda", batch=5)
    engine.close()
    assert ["of the plan's 48 hot neurons, not its output head fit" in said for said in engine.notices] == [
        True
    ]


def test_what_a_gpu_holds_need_not_fit_in_ram(llama: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    path = llama.split([llama.neurons] * 3, attention=range(3), head=True)
    model = load_model(path)
    # The embedding stays outside; the tiny model's weights are less than what is left to the system.
    room = memory.MARGIN + model.embedding.nbytes
    monkeypatch.setattr(layers, "available_ram_bytes", lambda: room)
    monkeypatch.setattr(from_disk, "available_ram_bytes", lambda: room)
    gpu = FakeGpu(1 << 30)
    on(monkeypatch, gpu)
    Engine(model, threads=1, device="cuda", batch=5, context=40).close()
    with pytest.raises(ModelError, match="of memory that are free"):
        Engine(load_model(path), threads=1, batch=5, context=40)
    on(monkeypatch, FakeGpu(1 << 30))
    monkeypatch.setattr(layers, "available_ram_bytes", lambda: memory.MARGIN - (1 << 22))
    with pytest.raises(ModelError, match=r"but for \d MiB in VRAM, do not fit in the"):
        Engine(load_model(path), threads=1, device="cuda", batch=5, context=40)


def test_fused_kernels_in_blocks_and_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In Triton's interpreter: single tokens go through the fused kernels, prompts through unpacked rows."""
    model = Prepared(tmp_path, "llama-Q4_1")
    path, tokens = model.split([GROUP, 0, 0], attention=[0, 2], head=True), model.tiny.tokens(3)

    def run(device: str) -> np.ndarray:
        engine = Engine(load_model(path), threads=1, device=device, batch=2, context=8)
        rows = [engine.prefill(tokens[:2]).copy(), *(engine.decode(token).copy() for token in tokens[2:])]
        engine.close()
        return np.stack(rows)

    expected = run("none")
    on(monkeypatch, FakeGpu(1 << 30), fused=True)
    products: list[int] = []
    matvec, matvecs = triton_launch.matvec, triton_launch.matvecs
    monkeypatch.setattr(triton_launch, "matvec", lambda *a: (products.append(a[1].rows), matvec(*a))[1])
    monkeypatch.setattr(
        triton_launch, "matvecs", lambda *a: (products.extend(m.rows for m in a[1]), matvecs(*a))[1]
    )
    got = run("cuda")
    assert set(products) == {model.tiny.spec.heads * 16, 2 * 16, 64, load_model(path).hyper.vocabulary}
    # As for the neurons: a flipped rounding of an activation is one part in 254 of a block's largest value.
    assert np.abs(got - expected).max() <= 0.02 * np.abs(expected).max()


@pytest.mark.parametrize("when", ["submit", "wait"])
def test_a_lost_device_takes_its_cache_along_which_is_an_error(
    llama: Prepared, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    path, tokens = llama.split([GROUP] * 3, attention=[1]), llama.tiny.tokens(18)
    on(monkeypatch, FailingGpu(9, when=when))
    with pytest.raises(DeviceLost, match="the KV cache in its memory is lost; begin again"):
        logits(path, tokens, device="cuda")


def test_a_lost_device_gives_the_head_back(llama: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    path, tokens = llama.split([GROUP] * 3, head=True), llama.tiny.tokens(6)
    on(monkeypatch, FailingGpu(8, when="wait"))
    engine = Engine(load_model(path), threads=1, device="cuda")
    got = [engine.decode(token).copy() for token in tokens]
    engine.close()
    assert len(engine.notices) == 1
    engine = Engine(load_model(path), threads=1, device="cpu")
    assert np.array_equal(got, [engine.decode(token).copy() for token in tokens])
    engine.close()


def test_both_sides_work_at_once_while_the_stream_is_on_the_device(
    llama: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hot part goes on while the host computes the cold one; attention comes before both."""
    meeting, compute = Meeting(), HotFFN.compute
    monkeypatch.setattr(HotFFN, "compute", lambda *a: (meeting(), compute(*a))[1])
    path = llama.split([GROUP] * 3, attention=range(3), head=True)
    engine = Engine(load_model(path), threads=1, device="cpu")
    stack, run = engine.stack, engine.stack.run
    engine.prefill(llama.tiny.tokens(2))
    cold = {(stop.ready, stop.needed) for stop in stack._stops}

    def meeting_run(first: int, last: int, *rest: int) -> None:
        if (first, last) in cold:
            meeting()
        run(first, last, *rest)

    monkeypatch.setattr(stack, "run", meeting_run)
    timeline = engine.trace()
    meeting.open = True
    engine.decode(3)
    engine.close()
    assert meeting.count == 3
    for layer in range(3):
        here, there = (
            next(e for e in reversed(timeline.events) if (e.track, e.name, e.layer) == (track, name, layer))
            for track, name in (("CPU", "cold"), ("hot side", "hot"))
        )
        assert min(here.end, there.end) > max(here.start, there.start)
