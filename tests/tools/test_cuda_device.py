"""The CUDA device on a ``torch.cuda`` that notes what is asked of it: see ``fake_cuda``."""

import os
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from fake_cuda import FakeCuda
from powerinfer_tools.engine import Engine
from powerinfer_tools.engine.hot import devices, fusing, loss, mapped, opening
from powerinfer_tools.engine.hot.devices import CudaDevice
from powerinfer_tools.engine.hot.faults import DeviceLost, KernelRefused, MemoryEnded, OutOfDeviceMemory
from powerinfer_tools.engine.hot.hot_ffn import HotFFN
from powerinfer_tools.engine.hot.work import Launches
from powerinfer_tools.model.device_memory import budget_for
from powerinfer_tools.model.loading import load_model
from split_models import GROUP, Prepared
from test_hot_predictors import Predicted
from test_hot_units import logits


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    fake.install(monkeypatch)
    return fake


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return Prepared(tmp_path_factory.mktemp("llama"), "llama")


def test_steps_are_queued_on_one_stream_between_events(cuda: FakeCuda) -> None:
    device = CudaDevice()
    device.timed = True
    cuda.log.clear()
    first = device.submit([("copy in", cuda.kernel), ("hot", cuda.kernel)])
    second = device.submit([("merge", cuda.kernel)])
    assert cuda.log == ["record", *["kernel", "record"] * 2, "record", "kernel", "record"]
    assert cuda.current is cuda.first
    # The later one first, as who waits for several does.
    (merge,), (copy, hot) = second.wait(), first.wait()
    assert [copy.name, hot.name, merge.name] == ["copy in", "hot", "merge"]
    assert [round((span.end - span.start) * 1e3, 6) for span in (copy, hot, merge)] == [0.25] * 3
    assert copy.end == hot.start < hot.end < merge.start
    # Events are used again.
    made = len(device._clock._free)
    device.submit([("hot", cuda.kernel)]).wait()
    assert len(device._clock._free) == made


def test_times_stay_exact_after_hours(cuda: FakeCuda) -> None:
    """Milliseconds since the start in single precision are a quarter of a millisecond apart after an hour."""
    device = CudaDevice()
    device.timed = True
    for _ in range(5):
        cuda._now += 1e6
        outer, inner = (device.submit([("hot", cuda.kernel)]) for _ in range(2))
        (late,), (early,) = inner.wait(), outer.wait()
        for span in (early, late):
            assert (span.end - span.start) * 1e3 == pytest.approx(0.25, rel=1e-3)
        assert (late.start - early.end) * 1e3 == pytest.approx(0.25, rel=1e-3)


def test_a_graph_is_recorded_after_a_run_and_replayed(cuda: FakeCuda) -> None:
    device, x = CudaDevice(), torch.zeros(3)
    cuda.log.clear()
    steps = device.recorded([("copy in", cuda.kernel), ("hot", lambda: x.add_(1))])
    assert cuda.log == ["kernel", "record", "wait", "begin", "kernel", "end"]
    assert cuda.current is cuda.first
    x.zero_()
    cuda.log.clear()
    assert device.submit(steps).wait() == []
    assert cuda.log == ["replay", "record", "wait"]
    device.timed = True
    cuda.log.clear()
    for _ in range(2):
        (span,) = device.submit(steps).wait()
    assert cuda.log == ["record", "replay", "record", "wait"] * 2
    assert span.name == "hot"
    assert x.tolist() == [3, 3, 3]


def test_one_wait_is_enough_for_all_that_was_queued_before(cuda: FakeCuda) -> None:
    """Only work that somebody waits for has an event, and none a time."""
    device, timing = CudaDevice(), cuda.timing
    cuda.log.clear()
    tickets = [device.submit([("hot", cuda.kernel)], awaited=awaited) for awaited in (True, False, True)]
    assert [ticket.wait() for ticket in reversed(tickets)] == [[], [], []]
    assert cuda.log == ["kernel", "record", "kernel", "kernel", "record", "wait"]
    assert cuda.timing == timing
    # Events are used again; what has none waits for all that is queued.
    cuda.log.clear()
    device.submit([("hot", cuda.kernel)], awaited=False).wait()
    assert cuda.log == ["kernel", "record", "wait"]
    assert len(device._marks._free) == 2


def test_wsl_is_asked_how_far_it_is_after_each_piece(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(devices, "WSL_DEVICE", tmp_path)
    device = CudaDevice()
    cuda.log.clear()
    for device.timed, marks in ((False, 1), (True, 2)):
        device.submit([("hot", cuda.kernel)], awaited=False)
        assert cuda.log == [*["record"] * (marks - 1), "kernel", "record", "query"]
        cuda.log.clear()


def test_windows_are_tried_once(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch or the driver cannot do, and what does not arrive, ends in copies, said once."""
    device = CudaDevice()
    host = device.staging(2, 3)
    assert device.window(host) is None, "it is not pinned"
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda _: True)
    with pytest.raises((RuntimeError, TypeError, ValueError, AssertionError)):
        mapped.mapped(host, torch.device("cuda", 0))
    monkeypatch.setattr(devices, "mapped", lambda host, _: host)
    window = device.window(host)
    assert window is not None
    mapped.through(torch.full((2, 3), -0.0), window)
    assert host.view(torch.int32).tolist() == [[-(2**31)] * 3] * 2
    device.window(host)
    assert host.view(torch.int32).tolist() == [[-(2**31)] * 3] * 2, "tried again"
    other = CudaDevice()
    monkeypatch.setattr(devices, "mapped", lambda host, _: host.clone())
    assert other.window(host) is None
    assert other.window(host) is None
    assert other.notices == [
        "kernels cannot reach pinned memory (what a kernel wrote did not arrive): it is copied"
    ]


def test_without_graphs_steps_stay_as_they_are_which_is_said_once(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the stream that torch leaves current does not stay so."""
    device = CudaDevice()
    steps = [("hot", lambda: cuda.asked("cudaMalloc"))]
    for _ in range(2):
        assert device.recorded(steps) is steps
        assert cuda.current is cuda.first
    assert device.notices == [
        "no CUDA graphs (CUDA error: operation failed due to a previous error during capture): each kernel "
        "is launched by itself"
    ]
    assert cuda.log.count("begin") == 1
    device.submit(steps).wait()
    monkeypatch.setenv(devices.GRAPHS_VARIABLE, "0")
    off = CudaDevice()
    assert off.recorded(steps) is steps
    assert not off.notices


@pytest.mark.parametrize("what", ["kernel", "record", "wait"])
def test_errors_of_the_driver_are_a_lost_device(cuda: FakeCuda, what: str) -> None:
    device = CudaDevice()
    cuda.log.clear()
    cuda.fail[what, 1] = torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nmore")
    with pytest.raises(DeviceLost, match=r"^CUDA error: an illegal memory access was encountered$"):
        device.submit([("hot", cuda.kernel)]).wait()
    cuda.log.clear()
    with pytest.raises(DeviceLost):
        device.recorded([("hot", cuda.kernel)])
    assert cuda.current is cuda.first
    cuda.fail["synchronize", 1] = torch.AcceleratorError("CUDA error: an illegal memory access")
    device.close()


def test_memory_that_is_not_there_is_said_in_bytes(cuda: FakeCuda) -> None:
    device, full = CudaDevice(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
    cuda.fail["allocate", 1] = full
    with pytest.raises(OutOfDeviceMemory, match=f"77 bytes cannot be had, {cuda.free} are free"):
        device.allocate(77)
    cuda.fail["kernel", 1] = full
    with pytest.raises(OutOfDeviceMemory, match=r"^CUDA out of memory$"):
        device.recorded([("hot", cuda.kernel)])
    cuda.fail["pin", 1] = torch.AcceleratorError("CUDA error: out of memory")
    assert device.staging(2, 3).shape == (2, 3)
    assert device.notices == [
        "no pinned memory (CUDA error: out of memory): copies to and from the GPU are slower"
    ]
    assert device.peak_bytes() == 123


def test_memory_that_ends_in_a_run_is_given_back_and_asked_for_once_more(cuda: FakeCuda) -> None:
    device, full = CudaDevice(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
    device.timed = True
    cuda.log.clear()
    cuda.fail["kernel", 1] = full
    (span,) = device.submit([("hot", cuda.kernel)]).wait()
    assert span.name == "hot"
    assert [what for what in cuda.log if what in ("kernel", "empty cache")] == [
        "kernel",
        "empty cache",
        "kernel",
    ]
    cuda.log.clear()
    cuda.fail["kernel", 2] = full
    with pytest.raises(MemoryEnded, match=f"^out of VRAM, {cuda.free} bytes are free$"):
        device.submit([("hot", cuda.kernel)])


def test_a_launch_that_found_no_memory_is_done_again_and_those_before_it_are_not(cuda: FakeCuda) -> None:
    device, sums = CudaDevice(), [0]

    def add() -> None:
        sums[0] += 1

    def kernel() -> None:
        cuda.kernel()
        add()

    cuda.log.clear()
    cuda.fail["kernel", 1] = torch.OutOfMemoryError("CUDA out of memory.")
    device.submit([("merge", Launches([add, kernel]))]).wait()
    assert sums == [2]
    assert "empty cache" in cuda.log


class RefusedByTriton(Exception):
    """As Triton's: no RuntimeError."""


def refused() -> None:
    raise RefusedByTriton("PTXAS error: too many registers\nmore")


def test_a_kernel_that_triton_refuses_is_said_as_such(cuda: FakeCuda) -> None:
    device = CudaDevice()
    for way in (device.prepare, device.recorded):
        with pytest.raises(KernelRefused, match=r"^PTXAS error: too many registers$"):
            way([("hot", refused)])
    with pytest.raises(DeviceLost, match=r"^PTXAS error: too many registers$"):
        device.submit([("hot", refused)])


def test_a_refused_kernel_ends_in_the_plain_form(
    llama: Prepared, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that was made with it is let go of before the cache of the allocator is emptied."""
    held: list[weakref.ref[torch.UntypedStorage]] = []
    assemble = opening.assemble

    def refusing(*arguments: object, fused: bool, rehearse: object) -> object:
        assert rehearse is None, "nobody listens"
        backend, kinds = assemble(*arguments, fused=False)  # type: ignore[arg-type]
        if fused:
            held.append(weakref.ref(backend.layers[1].down.data.untyped_storage()))  # type: ignore[union-attr]
            backend.prepare = lambda tokens: backend.device.prepare([("hot", refused)])  # type: ignore[method-assign]
        return backend, kinds

    asked = cuda.asked

    def looking(what: str) -> None:
        if what == "empty cache":
            assert held
            assert held[0]() is None, "a tensor is still held when memory is given back"
        asked(what)

    monkeypatch.setattr(opening, "fusing_problem", lambda: None)
    monkeypatch.setattr(opening, "assemble", refusing)
    monkeypatch.setattr(cuda, "asked", looking)
    path = llama.split([GROUP, llama.neurons, GROUP])
    engine = Engine(load_model(path), threads=1, device="cuda", batch=5)
    assert engine.notices[0].startswith(
        "no fused GPU kernels: one that is needed could not be built or launched (PTXAS error: too many"
    )
    assert engine.report().device == "cuda"
    engine.close()


def test_out_of_memory_at_the_start_gives_all_back(
    llama: Prepared, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[weakref.ref[torch.UntypedStorage]] = []
    assemble = opening.assemble

    def short(*arguments: object, fused: bool, rehearse: object) -> object:
        backend, _ = assemble(*arguments, fused=fused)  # type: ignore[arg-type]
        held.append(weakref.ref(backend.layers[1].down.data.untyped_storage()))  # type: ignore[union-attr]
        raise OutOfDeviceMemory("77 bytes cannot be had")

    monkeypatch.setattr(opening, "assemble", short)
    path = llama.split([GROUP, llama.neurons, GROUP])
    engine = Engine(load_model(path), threads=1, device="cuda", batch=5)
    assert held[0]() is None
    assert cuda.log[-1] == "empty cache"
    assert "out of VRAM at the start: 77 bytes cannot be had" in engine.notices[0]
    engine.close()


def test_a_budget_holds_what_libraries_take_too(llama: Prepared, cuda: FakeCuda) -> None:
    """What is gone of the memory is measured, and less is placed on the GPU until the budget holds."""
    path = llama.split([llama.neurons] * 3)
    with Engine(load_model(path), threads=1, device="cuda", batch=5) as engine:
        everything = engine.report().memory.vram
    budget = budget_for(everything)
    cuda.libraries = budget // 3
    cuda.log.clear()
    with Engine(load_model(path), threads=1, device="cuda", batch=5, vram=budget) as engine:
        memory = engine.report().memory
        assert 0 < memory.vram < everything
        assert memory.vram_peak is not None
        assert cuda.libraries < memory.vram_peak <= budget
    cuda.libraries = budget
    cuda.log.clear()
    with Engine(load_model(path), threads=1, device="cuda", batch=5, vram=budget) as engine:
        assert engine.report().device == "none"
        assert engine.notices[0].endswith("nothing of the plan fits; everything is computed on the CPU")
    assert cuda.free_now() == cuda.free - cuda.libraries


def test_a_lost_device_is_never_destroyed(
    llama: Prepared, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "_lost", False)
    monkeypatch.setattr(loss, "_kept", kept := list[object]())
    path, tokens = llama.split([GROUP] * 3), llama.tiny.tokens(9)
    with Engine(load_model(path), threads=1, device="cuda", batch=5) as engine:
        cuda.fail = {("record", cuda.log.count("record") + 2): RuntimeError("CUDA error: device lost")}
        engine.prefill(tokens)
        assert any("stopped working" in notice for notice in engine.notices)
    assert loss.was_lost()
    assert len(kept) == 1


def test_a_process_that_lost_a_device_ends_with_its_own_code() -> None:
    """Without destructors: an exception in one of them would abort."""
    program = (
        "import os, sys\n"
        "from powerinfer_cli.boundary import end_after_loss\n"
        "from powerinfer_tools.engine.hot import loss\n"
        "class Graph:\n    def __del__(self): os.abort()\n"
        "graph = Graph()\n"
        "if len(sys.argv) > 1: loss.keep(graph); print('lost'); end_after_loss(1)\n"
        "end_after_loss(1)\n"
    )
    paths = os.pathsep.join(path for path in sys.path if path)
    for arguments, code in (["lost"], 1), ([], -signal.SIGABRT):
        command = [sys.executable, "-c", program, *arguments]
        done = subprocess.run(command, check=False, capture_output=True, env={"PYTHONPATH": paths})
        assert done.returncode == code, done.stderr


def test_after_a_failed_recording_stream_and_pool_are_fresh(cuda: FakeCuda) -> None:
    device = CudaDevice()
    before = device._stream
    device.recorded([("hot", lambda: cuda.asked("cudaMalloc"))])
    assert device._stream is not before
    device.submit([("hot", cuda.kernel)]).wait()


def test_products_are_in_full_precision_whatever_the_program_has_set(cuda: FakeCuda) -> None:
    matmul = torch.backends.cuda.matmul
    name, loose, exact = (
        ("fp32_precision", "tf32", "ieee")
        if hasattr(matmul, "fp32_precision")
        else ("allow_tf32", True, False)
    )
    before, seen = getattr(matmul, name), []
    setattr(matmul, name, loose)
    try:
        device = CudaDevice()
        steps = device.recorded([("hot", lambda: seen.append(getattr(matmul, name)))])
        device.submit([("hot", lambda: seen.append(getattr(matmul, name)))]).wait()
        assert getattr(matmul, name) == loose
    finally:
        setattr(matmul, name, before)
    assert steps
    assert seen
    assert set(seen) == {exact}


@pytest.mark.parametrize("attention", [[], [0, 1]], ids=["neurons", "stream"])
def test_the_whole_engine_with_graphs(
    llama: Prepared, cuda: FakeCuda, attention: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was recorded once is right for every token; nothing runs on the first stream; all is freed."""
    path = llama.split([GROUP, llama.neurons, GROUP], attention=attention, head=bool(attention))
    tokens = llama.tiny.tokens(18)
    expected = logits(path, tokens, device="cpu")
    engine = Engine(load_model(path), threads=1, device="cuda", batch=5)
    side = engine.stack._hot
    memory = weakref.ref(side._backend.layers[2].down.data.untyped_storage())  # type: ignore[union-attr]
    begun, timing = cuda.log.count("begin"), cuda.timing
    rows = [engine.prefill(tokens[:12]).copy()]
    before = len(cuda.log)
    rows += [engine.decode(token).copy() for token in tokens[12:]]
    decoding = cuda.log[before:]
    waits = decoding.count("wait") / len(tokens[12:])
    engine.rewind(9)
    rows.append(engine.prefill(tokens[9:13]).copy())
    report = engine.report()
    engine.close()
    assert np.abs(np.stack(rows) - expected).max() <= 2000 * np.finfo(np.float32).eps * np.abs(expected).max()
    assert decoding.count("replay") > 0
    # A layer apart is waited for; of the stream, what the host reads in its turn, and the end; and the head.
    assert waits == (4 if attention else 3)
    assert cuda.timing == timing, "events with times though nobody asked for them"
    assert begun == cuda.log.count("begin"), "recorded while decoding"
    assert "synchronize" not in decoding
    assert report.device == "cuda"
    assert [notice.split(":")[0] for notice in engine.notices] == ["no fused GPU kernels"]
    assert cuda.log[-2:] == ["synchronize", "empty cache"]
    assert cuda.pinned > 0
    assert memory() is None


@pytest.mark.parametrize("attention", [[], [0, 1, 2]], ids=["neurons", "stream"])
def test_what_runs_before_the_first_token_is_not_counted(
    attention: list[int], tmp_path: Path, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels are run once before they are recorded, on whatever is in memory."""
    monkeypatch.setattr(HotFFN, "_gathered", HotFFN._chunked)  # what torch's CPU device alone can do
    model = Predicted(tmp_path, "low-rank")
    path, tokens = model.split([GROUP] * 3, attention, [0, 1, 2]), model.tiny.tokens(9)
    densities = []
    for device in ("cpu", "cuda"):
        engine = Engine(load_model(path), threads=1, device=device, batch=5)
        engine.prefill(tokens[:7])
        for token in tokens[7:]:
            engine.decode(token)
        densities.append(engine.report().density)
        engine.close()
    assert densities[0] == densities[1]
    assert "pin" in cuda.log


def test_a_gpu_that_fails_at_the_start_is_not_used(llama: Prepared, cuda: FakeCuda) -> None:
    path = llama.split([GROUP] * 3)
    for error, said in (
        (torch.AcceleratorError("CUDA error: unspecified launch failure"), "stopped working at the start"),
        (torch.OutOfMemoryError("CUDA out of memory. And so on."), "out of VRAM at the start: CUDA out of"),
    ):
        cuda.log.clear()
        cuda.fail = {("record", 4): error}
        engine = Engine(load_model(path), threads=1, device="cuda", batch=5)
        engine.close()
        assert engine.report().device == "none"
        assert [said in notice for notice in engine.notices] == [True]


def test_fused_kernels_are_tried_before_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    from powerinfer_kernels import triton_launch

    here = torch.device("cpu")
    assert fusing.tried(here) is None
    matvec = triton_launch.matvec
    monkeypatch.setattr(triton_launch, "matvec", lambda x, *rest: matvec(x + 1, *rest))
    assert fusing.tried(here) == "they compute wrong sums"

    def no_compiler(*_: object) -> None:
        raise RuntimeError("Failed to find C compiler.\nmore")

    monkeypatch.setattr(triton_launch, "matvec", no_compiler)
    assert fusing.tried(here) == (
        "none could be built and launched (Failed to find C compiler.); Triton needs a C compiler and "
        "Python's header files"
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    monkeypatch.setattr(fusing, "tried", lambda where: str(where))
    assert opening.fusing_problem() == "cuda:0"
