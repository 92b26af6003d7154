"""Devices that the hot side runs on: a queue of work that goes on while the caller does something else.

Everything that differs between CUDA and torch's CPU device is here: memory, pinned buffers, the queue (a
stream, or a thread of its own), and the ticket that says when queued work is done and how long it took.
"""

import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol

import torch

from powerinfer_tools.engine.hot import Span
from powerinfer_tools.errors import HardwareError

Work = Callable[[], None]
#: Named pieces of work, done one after the other.
Steps = Sequence[tuple[str, Work]]
#: Set to 0, launches are not recorded into CUDA graphs.
GRAPHS_VARIABLE = "POWERINFER_CUDA_GRAPHS"


class OutOfDeviceMemory(HardwareError):
    """The device has no room for what was asked."""


class DeviceLost(HardwareError):
    """The device stopped working."""


class KernelRefused(HardwareError):
    """A fused kernel could not be compiled, loaded or launched: the plain-torch form has to do."""


class MemoryEnded(DeviceLost):
    """The device ran out of memory in the middle of a run; what it holds is whole."""


class Ticket(Protocol):
    """Queued work."""

    def wait(self) -> list[Span]:
        """Wait until it is done; when each step began and ended. Raises DeviceLost."""


@cache
def arithmetic(device: torch.device) -> tuple[str | int, ...]:
    """What decides the bits of sums on ``device``: itself, and what computes on it."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = ""
    if device.type == "cuda":
        return ("cuda", torch.cuda.get_device_name(device), torch.__version__, triton)
    capability = torch.backends.cpu.get_cpu_capability()
    return ("cpu", capability, torch.get_num_threads(), torch.__version__)


class Device(Protocol):
    """One device and its queue."""

    @property
    def torch_device(self) -> torch.device:
        """Where its tensors are."""

    def free_bytes(self) -> int | None:
        """Memory that can be had now; None where it is not limited."""

    def peak_bytes(self) -> int | None:
        """The most that torch ever took of it; None where that is not counted."""

    def allocate(self, nbytes: int) -> torch.Tensor:
        """uint8 (nbytes,) on the device. Raises OutOfDeviceMemory."""

    def staging(self, *shape: int) -> torch.Tensor:
        """A float32 tensor in memory of the host, from which copies need not be waited for."""

    def recorded(self, steps: Steps) -> Steps:
        """The same steps in the form that is quickest to queue, after having run them once."""

    def prepare(self, steps: Steps) -> None:
        """Run ``steps`` once and wait, where a first run takes longer or takes memory, so that a later one
        does not. Raises OutOfDeviceMemory and DeviceLost."""

    def submit(self, steps: Steps) -> Ticket:
        """Queue ``steps`` after everything that was queued before. Raises DeviceLost."""

    def close(self) -> None:
        """End the queue."""


class _Finished:
    """The ticket of the CPU device."""

    def __init__(self, future: "Future[list[Span]]") -> None:
        self._future = future

    def wait(self) -> list[Span]:
        return self._future.result()


class CpuDevice:
    """torch's CPU device: the queue is a thread of its own, so that work overlaps as it does on a GPU."""

    torch_device = torch.device("cpu")

    def __init__(self) -> None:
        self._queue = ThreadPoolExecutor(1, thread_name_prefix="powerinfer-hot")

    def free_bytes(self) -> int | None:
        """Not limited: see :class:`Device`."""
        return None

    def peak_bytes(self) -> int | None:
        """Not counted."""
        return None

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Memory of the host."""
        return torch.empty(nbytes, dtype=torch.uint8)

    def staging(self, *shape: int) -> torch.Tensor:
        """Memory of the host."""
        return torch.empty(shape, dtype=torch.float32)

    def recorded(self, steps: Steps) -> Steps:
        """As they are."""
        return steps

    def prepare(self, steps: Steps) -> None:
        """Nothing: the first run is as any."""

    def submit(self, steps: Steps) -> Ticket:
        """Give them to the thread."""
        return _Finished(self._queue.submit(_run_timed, steps))

    def close(self) -> None:
        """End the thread."""
        self._queue.shutdown()


@torch.inference_mode()
def _run_timed(steps: Steps) -> list[Span]:
    spans = []
    for name, work in steps:
        started = time.perf_counter()
        work()
        spans.append(Span(name, started, time.perf_counter()))
    return spans


class CudaDevice:
    """The first CUDA device, with one stream. Times are the device's own, put on the host's clock. Raises
    DeviceLost where there is none to be had."""

    torch_device = torch.device("cuda", 0)

    def __init__(self) -> None:
        self._graphs = os.environ.get(GRAPHS_VARIABLE) != "0"
        self.notices: list[str] = []
        try:
            self._begin_queue()
        except RuntimeError as error:
            raise DeviceLost(first_line(error)) from None

    def _begin_queue(self) -> None:
        self._stream = torch.cuda.Stream(self.torch_device)  # type: ignore[no-untyped-call]
        self._clock = _Clock(self._stream)
        # What steps allocate while they work lies in one place for all graphs: they never run at once.
        self._pool = torch.cuda.graph_pool_handle()

    def free_bytes(self) -> int | None:
        """What the driver says."""
        return int(torch.cuda.mem_get_info(self.torch_device)[0])

    def peak_bytes(self) -> int | None:
        """What torch's allocator has held at most."""
        return int(torch.cuda.max_memory_reserved(self.torch_device))

    def allocate(self, nbytes: int) -> torch.Tensor:
        """One block of the GPU's memory."""
        try:
            return torch.empty(nbytes, dtype=torch.uint8, device=self.torch_device)
        except torch.OutOfMemoryError:
            raise OutOfDeviceMemory(f"{nbytes} bytes cannot be had, {self.free_bytes()} are free") from None

    def staging(self, *shape: int) -> torch.Tensor:
        """Pinned memory of the host; where there is none to be had, memory that copies are waited for."""
        try:
            return torch.empty(shape, dtype=torch.float32, pin_memory=True)
        except RuntimeError as error:
            said = f"no pinned memory ({first_line(error)}): copies to and from the GPU are slower"
            if said not in self.notices:
                self.notices.append(said)
            return torch.empty(shape, dtype=torch.float32)

    def recorded(self, steps: Steps) -> Steps:
        """One CUDA graph of all steps. Where it cannot be recorded, they stay as they are, which is said. The
        run before it compiles kernels, loads them, and makes room for what libraries keep, none of which may
        happen while a graph is recorded. Raises OutOfDeviceMemory, KernelRefused and DeviceLost."""
        self.prepare(steps)
        if not self._graphs:
            return steps
        graph = torch.cuda.CUDAGraph()
        try:
            self._record(graph, steps)
        except RuntimeError as error:
            self._graphs = False
            self.notices.append(f"no CUDA graphs ({first_line(error)}): each kernel is launched by itself")
            self._leave_capture()
            return steps
        except Exception as error:  # noqa: BLE001 - Triton's errors derive from Exception
            raise KernelRefused(first_line(error)) from None
        names = [name for name, _ in steps]
        return [(next((name for name in _GRAPH_NAMES if name in names), names[0]), graph.replay)]

    def prepare(self, steps: Steps) -> None:
        """See :class:`Device`."""
        try:
            self._run(steps).wait()
        except HardwareError:
            raise
        except RuntimeError as error:
            raise self._failure(error) from None
        except Exception as error:  # noqa: BLE001 - Triton's errors derive from Exception
            raise KernelRefused(first_line(error)) from None

    def submit(self, steps: Steps) -> Ticket:
        """Queue them on the stream. Without memory for it, what torch holds in reserve goes back to the
        driver, and the steps are queued once more: they only write what they compute.
        """
        try:
            return self._run(steps)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
        except Exception as error:  # noqa: BLE001 - Triton's errors derive from Exception
            raise DeviceLost(first_line(error)) from None
        try:
            return self._run(steps)
        except torch.OutOfMemoryError:
            raise MemoryEnded(f"out of VRAM, {self.free_bytes()} bytes are free") from None
        except Exception as error:  # noqa: BLE001 - as above
            raise DeviceLost(first_line(error)) from None

    def close(self) -> None:
        """Wait for what is queued, and give the memory back to the driver, so far as nothing holds it."""
        # A device that was lost has said so already.
        with suppress(RuntimeError):
            self._stream.synchronize()
            torch.cuda.empty_cache()

    def _leave_capture(self) -> None:
        """Go on with a fresh stream and pool: torch 2.8 to 2.12 can leave those of a failed recording in the
        state of recording."""
        with suppress(RuntimeError):
            self._stream.synchronize()
        try:
            self._begin_queue()
        except RuntimeError as error:
            raise DeviceLost(first_line(error)) from None

    def _record(self, graph: torch.cuda.CUDAGraph, steps: Steps) -> None:
        # torch.cuda.graph leaves its stream current where recording fails; the outer one puts that right.
        with (
            torch.inference_mode(),
            full_precision(),
            torch.cuda.stream(self._stream),
            torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
        ):
            for _, work in steps:
                work()

    def _run(self, steps: Steps) -> "_Marked":
        clock = self._clock
        events = clock.events(len(steps) + 1)
        with torch.inference_mode(), full_precision(), torch.cuda.stream(self._stream):
            events[0].record(self._stream)
            for event, (_, work) in zip(events[1:], steps, strict=True):
                work()
                event.record(self._stream)
        return _Marked([name for name, _ in steps], events, clock)

    def _failure(self, error: RuntimeError) -> HardwareError:
        """What went wrong, in words."""
        if isinstance(error, torch.OutOfMemoryError):
            # The message of torch goes on about its own settings.
            return OutOfDeviceMemory("CUDA out of memory")
        return DeviceLost(first_line(error))


@contextmanager
def full_precision() -> Iterator[None]:
    """Products of float32 matrices in float32, whatever the calling program has set: TF32 rounds inputs to 10
    bits, an error of 5·10⁻⁴. Its setting is put back afterwards."""
    matmul: Any = torch.backends.cuda.matmul
    # torch 2.9 has a new name for it, and warns where both are used.
    name, value = ("fp32_precision", "ieee") if hasattr(matmul, "fp32_precision") else ("allow_tf32", False)
    before = getattr(matmul, name)
    setattr(matmul, name, value)
    try:
        yield
    finally:
        setattr(matmul, name, before)


#: What a graph of several steps is called in a trace: the first of these that is among them.
_GRAPH_NAMES = ("attention", "hot", "merge", "head")
#: Seconds after which times are counted from a later event: CUDA says them in single precision.
_REBASE_SECONDS = 1.0


class _Clock:
    """Events of a stream, and when they were on the host's clock."""

    def __init__(self, stream: Any) -> None:
        self._free, self._base = list[Any](), _event()
        self._base.record(stream)
        self._base.synchronize()
        self._zero = time.perf_counter()
        self._held = 0

    def events(self, count: int) -> list[Any]:
        """Events that nobody else holds, to be recorded in order and given to :meth:`times`."""
        while len(self._free) < count:
            self._free.append(_event())
        self._held += count
        return [self._free.pop() for _ in range(count)]

    def times(self, events: list[Any]) -> list[float]:
        """Wait for ``events``; when each was. They can be recorded again. Raises DeviceLost."""
        try:
            events[-1].synchronize()
            first = self._zero + float(self._base.elapsed_time(events[0])) / 1e3
            times = [first, *(first + float(events[0].elapsed_time(event)) / 1e3 for event in events[1:])]
        except RuntimeError as error:
            raise DeviceLost(first_line(error)) from None
        self._held -= len(events)
        self._free += events
        if not self._held and times[-1] - self._zero > _REBASE_SECONDS:
            # All that will be asked for is later than this event.
            self._free.append(self._base)
            self._base, self._zero = self._free.pop(-2), times[-1]
        return times


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


class _Marked:
    """The ticket of a stream: an event before the first step and after each."""

    def __init__(self, names: list[str], events: list[Any], clock: _Clock) -> None:
        self._names, self._events, self._clock = names, events, clock

    def wait(self) -> list[Span]:
        times = self._clock.times(self._events)
        return [Span(name, times[i], times[i + 1]) for i, name in enumerate(self._names)]


def cuda_problem() -> str | None:
    """Why no CUDA device can be used, in words; None where one can. Tries a small piece of work on it."""
    with warnings.catch_warnings():
        # What torch warns of here is what is said below.
        warnings.simplefilter("ignore")
        available = torch.cuda.is_available()
    if not available:
        built = torch.version.cuda
        if built is None:
            return f"torch {torch.__version__} is a build without CUDA"
        return (
            f"torch {torch.__version__} finds no GPU that it can use: there is none, or its driver is older "
            f"than CUDA {built} needs"
        )
    try:
        probe = torch.ones(8, device="cuda")
        if float((probe + probe).sum()) != 16.0:
            return "the GPU computes wrong sums"
    except RuntimeError as error:
        return f"the GPU{_capability()} cannot be used: {first_line(error)}"
    return None


def _capability() -> str:
    """In brackets, where a GPU that does not work still says it."""
    try:
        major, minor = torch.cuda.get_device_capability(0)
    except RuntimeError:
        return ""
    return f" (compute capability {major}.{minor})"


def first_line(error: BaseException) -> str:
    """The first line of a message, which is where torch says what happened."""
    return (str(error).splitlines() or [type(error).__name__])[0]
