"""The hot side on devices that tests make up: what fits, what overlaps, what is said when something fails.

No GPU is needed: a device here is torch's CPU device with other memory, another queue, or a fault.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_logits import greedy, of_engine
from fake_gpus import MIB, FailingGpu, FakeGpu, LatestGpu, on
from meetings import Meeting
from powerinfer_tools.engine import Engine
from powerinfer_tools.engine.hot import cuda_checks, opening
from powerinfer_tools.engine.hot.hot_ffn import FusedRows, HotFFN
from powerinfer_tools.engine.hot.placement import Workload, units_size
from powerinfer_tools.engine.timeline import Timeline
from powerinfer_tools.errors import HardwareError
from powerinfer_tools.model.device_memory import MARGIN, budget_for
from powerinfer_tools.model.loading import load_model
from split_models import GROUP, Prepared


@pytest.fixture(scope="module")
def relu(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return Prepared(tmp_path_factory.mktemp("relu"), "llama-relu")


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return Prepared(tmp_path_factory.mktemp("quantised"), "llama-Q4_1")


@pytest.fixture(params=["llama", "llama-relu", "opt"], scope="module")
def dense(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return Prepared(tmp_path_factory.mktemp("dense"), request.param)


def test_any_plan_chooses_the_tokens_of_the_dense_model(dense: Prepared) -> None:
    """Weights of single precision, so that both ways differ in the order of sums alone."""
    tokens = dense.tiny.tokens(6)
    expected = greedy(dense.split([0] * dense.layers), tokens, 8)
    steps = dense.neurons // GROUP
    modes = ["dense"] if dense.tiny.spec.activation == "silu" else ["dense", "gate-first"]

    @settings(max_examples=12, derandomize=True, deadline=None)
    @given(
        st.lists(st.integers(0, steps), min_size=dense.layers, max_size=dense.layers),
        st.sampled_from(modes),
        st.sets(st.sampled_from(range(dense.layers))),
        st.booleans(),
    )
    def check(groups: list[int], mode: str, attention: set[int], head: bool) -> None:
        path = dense.split([GROUP * count for count in groups], mode, attention=sorted(attention), head=head)
        assert greedy(path, tokens, 8, device="cpu") == expected

    check()


def test_fused_kernels_in_the_whole_engine(quantised: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    """In Triton's interpreter: prompts through unpacked rows, single tokens through the fused kernels."""
    tokens = quantised.tiny.tokens(4)
    path = quantised.split([GROUP] + [0] * (quantised.layers - 1))
    expected = of_engine(Engine(load_model(path), threads=1), tokens)
    on(monkeypatch, FakeGpu(1 << 30), fused=True)
    engine = Engine(load_model(path), threads=1, device="cuda", batch=2, context=8)
    backend = engine.stack._hot._backend  # type: ignore[union-attr]
    assert isinstance(backend.layers[0].gate, FusedRows)
    got = of_engine(engine, tokens)
    # As for plain torch: a flipped rounding of an activation is one part in 254 of a block's largest value.
    assert np.abs(got - expected).max() <= 0.02 * np.abs(expected).max()
    on(monkeypatch, FakeGpu(1 << 30), fused=True)
    again = of_engine(Engine(load_model(path), threads=1, device="cuda", batch=2, context=8), tokens)
    assert np.array_equal(got, again)


def test_one_wait_for_each_split_layer_and_no_other_order_is_relied_on(
    relu: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = relu.tiny.tokens(5)
    hot = [GROUP * (1 + index) for index in range(relu.layers - 1)] + [0]
    path = relu.split(hot)
    expected = of_engine(Engine(load_model(path), threads=1, device="cpu"), tokens)
    gpu = LatestGpu()
    on(monkeypatch, gpu)
    got = of_engine(Engine(load_model(path), threads=1, device="cuda"), tokens)
    assert np.abs(got - expected).max() <= 2000 * np.finfo(np.float32).eps * np.abs(expected).max()
    forwards = 1 + len(tokens) - 2
    assert len(gpu.stops) == forwards * sum(count > 0 for count in hot)


def test_both_sides_of_a_layer_work_at_once_and_the_timeline_says_so(
    relu: Prepared, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    meeting, compute = Meeting(), HotFFN.compute
    monkeypatch.setattr(HotFFN, "compute", lambda *a: (meeting(), compute(*a))[1])
    engine = Engine(load_model(relu.split([GROUP] * relu.layers)), threads=1, device="cpu")
    stack, timeline = engine.stack, Timeline()
    run = stack.run
    cold = {(stop.ready, stop.needed) for stop in stack._stops}

    def meeting_run(first: int, last: int, *rest: int) -> None:
        if (first, last) in cold:
            meeting()
        run(first, last, *rest)

    engine.prefill(relu.tiny.tokens(2))
    monkeypatch.setattr(stack, "run", meeting_run)
    stack.timeline = timeline
    meeting.open = True
    engine.decode(3)
    report = engine.report()
    engine.close()
    assert meeting.count == relu.layers
    assert report.timings["hot"] > 0
    assert report.overlap is not None
    events = {(event.name, event.layer): event for event in timeline.events}
    for layer in range(relu.layers):
        hot_event, cold_event = events["hot", layer], events["cold", layer]
        assert min(hot_event.end, cold_event.end) > max(hot_event.start, cold_event.start)
    timeline.write(tmp_path / "trace.json")
    rows = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {row["args"]["name"] for row in rows if row["ph"] == "M"} == {"CPU", "hot side"}
    assert {row["name"] for row in rows if row["ph"] == "X"} >= {
        "attention", "launch", "cold", "wait", "copy in", "hot", "copy out", "head",
    }  # fmt: skip
    assert min(row["ts"] for row in rows if row["ph"] == "X") == 0


def test_memory_is_allocated_up_front_within_the_budget(
    quantised: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = quantised.split([quantised.neurons] * quantised.layers)
    model = load_model(path)
    whole = units_size(model, opening.planned_units(model), Workload(4, 16)).total
    budget = budget_for(whole * 2 // 3)
    gpu = FakeGpu(free=1 << 30)
    on(monkeypatch, gpu)
    engine = Engine(model, threads=1, device="cuda", vram=budget, batch=4, context=16)
    assert len(gpu.asked) == 1
    assert 0 < engine.report().memory.vram <= budget
    assert gpu.asked[0] <= budget
    of_engine(engine, quantised.tiny.tokens(6))
    assert len(gpu.asked) == 1


def test_budgets_that_do_not_fit_are_refused_with_numbers_or_the_split_moves(
    quantised: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = quantised.split([quantised.neurons] * quantised.layers)
    gpu = FakeGpu(free=200 * MIB)
    on(monkeypatch, gpu)
    with pytest.raises(HardwareError, match="--vram 201 MiB: the GPU has 200 MiB free"):
        Engine(load_model(path), threads=1, device="cuda", vram=201 * MIB)
    assert not gpu.asked
    scratch = 4 * (4 * (2 * 64 + 3 * GROUP) + 3 * GROUP * 64)
    on(monkeypatch, FakeGpu(free=MARGIN + budget_for(4 * scratch)))
    engine = Engine(load_model(path), threads=1, device="cuda", batch=4, context=16)
    engine.close()
    assert any("hot neurons fit in the" in notice for notice in engine.notices)


@pytest.mark.parametrize("problem", ["no device", "no memory"])
def test_without_a_usable_gpu_the_cpu_computes_everything_which_is_said_once(
    relu: Prepared, monkeypatch: pytest.MonkeyPatch, problem: str
) -> None:
    path, tokens = relu.split([GROUP] * relu.layers), relu.tiny.tokens(4)
    expected = of_engine(Engine(load_model(path), threads=1), tokens)
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
    relu: Prepared, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    path, tokens = relu.split([GROUP * 2] * relu.layers), relu.tiny.tokens(6)
    expected = of_engine(Engine(load_model(path), threads=1, device="cpu"), tokens)
    on(monkeypatch, FailingGpu(relu.layers + 2, when=when))
    engine = Engine(load_model(path), threads=1, device="cuda")
    got = of_engine(engine, tokens)
    assert np.abs(got - expected).max() <= 2000 * np.finfo(np.float32).eps * np.abs(expected).max()
    assert [notice for notice in engine.notices if "the GPU stopped working (an illegal thing" in notice]
    assert len(engine.notices) == 1


def test_a_gpu_without_fused_kernels_or_graphs_is_used_without_and_says_so(
    relu: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = FakeGpu(1 << 30)
    gpu.notices = ["no CUDA graphs (a reason)"]  # type: ignore[attr-defined]
    monkeypatch.setattr(opening, "CudaDevice", lambda: gpu)
    monkeypatch.setattr(opening, "cuda_problem", lambda: None)
    monkeypatch.setattr(opening, "fusing_problem", lambda: "compute capability 6.1 is below 7.5")
    engine = Engine(load_model(relu.split([GROUP] * relu.layers)), threads=1, device="cuda")
    engine.close()
    assert engine.report().device == "cuda"
    assert [notice.split(":")[0] for notice in engine.notices] == [
        "no fused GPU kernels",
        "no CUDA graphs (a reason)",
    ]


def test_cuda_is_judged_by_what_torch_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "build without CUDA" in (cuda_checks.cuda_problem() or "")
    monkeypatch.setattr(torch.version, "cuda", "12.9")
    assert "driver is older than CUDA 12.9 needs" in (cuda_checks.cuda_problem() or "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (6, 1))

    def no_kernel(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: no kernel image is available\nmore")

    monkeypatch.setattr(torch, "ones", no_kernel)
    assert cuda_checks.cuda_problem() == (
        "the GPU (compute capability 6.1) cannot be used: CUDA error: no kernel image is available"
    )
    assert opening.fusing_problem() == "compute capability 6.1 is below 7.5"
