"""Devices that the hot side runs on: a queue of work that runs while the caller does something else.

Everything that differs between CUDA and torch's CPU device is here: memory, pinned buffers, the queue (a
stream, or a thread of its own), and the ticket that says when queued work is done and how long it took.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Protocol

import torch

from powerinfer_tools.engine.hot import Span
from powerinfer_tools.engine.hot.cuda_checks import full_precision
from powerinfer_tools.engine.hot.faults import (
    DeviceLost,
    KernelRefused,
    MemoryEnded,
    OutOfDeviceMemory,
    first_line,
)
from powerinfer_tools.engine.hot.mapped import mapped
from powerinfer_tools.engine.hot.marks import Clock, Marks, Passed, Timed
from powerinfer_tools.engine.hot.work import Work, pieces_of
from powerinfer_tools.errors import HardwareError

#: Named pieces of work, done one after the other.
Steps = Sequence[tuple[str, Work]]
#: Set to 0, launches are not recorded into CUDA graphs.
GRAPHS_VARIABLE = "POWERINFER_CUDA_GRAPHS"
#: Exists under WSL, where the driver holds queued work back until it is asked for its progress.
WSL_DEVICE = Path("/dev/dxg")


class Ticket(Protocol):
    """Queued work."""

    def wait(self) -> list[Span]:
        """Wait until it is done; when each step began and ended, if the device was ``timed`` or knows anyway.
        Raises DeviceLost."""


@cache
def arithmetic(device: torch.device) -> tuple[str | int, ...]:
    """The facts that determine the bits of sums on ``device``: the device itself, and the software that
    computes on it."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = ""
    if device.type == "cuda":
        return ("cuda", torch.cuda.get_device_name(device), torch.__version__, triton)
    capability = torch.backends.cpu.get_cpu_capability()
    return ("cpu", capability, torch.get_num_threads(), torch.__version__)


class Device(Protocol):
    """One device and its queue. ``timed``: tickets say when their steps began and ended."""

    timed: bool

    @property
    def torch_device(self) -> torch.device:
        """Where its tensors are."""

    def free_bytes(self) -> int | None:
        """Memory that is available now; None where it is not limited."""

    def peak_bytes(self) -> int | None:
        """The most memory that torch ever took; None where that is not counted."""

    def allocate(self, nbytes: int) -> torch.Tensor:
        """uint8 (nbytes,) on the device. Raises OutOfDeviceMemory."""

    def staging(self, *shape: int) -> torch.Tensor:
        """A float32 tensor in memory of the host, from which copies need not be waited for."""

    def window(self, host: torch.Tensor) -> torch.Tensor | None:
        """A tensor of :meth:`staging` as a tensor of the device, over the same memory; None where the
        device's kernels cannot access that memory."""

    def recorded(self, steps: Steps) -> Steps:
        """Run the steps once, and return them in the form that is quickest to queue."""

    def prepare(self, steps: Steps) -> None:
        """Run ``steps`` once and wait, where a first run takes longer or takes memory, so that a later one
        does not. Raises OutOfDeviceMemory and DeviceLost."""

    def submit(self, steps: Steps, *, awaited: bool = True) -> Ticket:
        """Queue ``steps`` after everything that was queued before. Without ``awaited``, the caller does not
        wait for these steps, but at most for later ones. Raises DeviceLost."""

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
        self.timed = True  # which costs nothing here
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

    def window(self, host: torch.Tensor) -> torch.Tensor | None:
        """None: copies are as quick."""
        return None

    def recorded(self, steps: Steps) -> Steps:
        """As they are."""
        return steps

    def prepare(self, steps: Steps) -> None:
        """Nothing: the first run is as any."""

    def submit(self, steps: Steps, *, awaited: bool = True) -> Ticket:
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
        self._graphs, self._held_back = os.environ.get(GRAPHS_VARIABLE) != "0", WSL_DEVICE.exists()
        self.timed = False
        self.notices: list[str] = []
        self._windows: bool | None = None  # once it was tried
        self._rehearses = False
        try:
            self._begin_queue()
        except RuntimeError as error:
            raise DeviceLost(first_line(error)) from None

    def _begin_queue(self) -> None:
        self._stream = torch.cuda.Stream(self.torch_device)  # type: ignore[no-untyped-call]
        self._clock, self._marks = Clock(self._stream), Marks(self._stream)
        # All graphs share one pool for the memory that steps allocate: they never run at the same time.
        self._pool = torch.cuda.graph_pool_handle()

    def free_bytes(self) -> int | None:
        """Free memory as reported by the driver."""
        return int(torch.cuda.mem_get_info(self.torch_device)[0])

    def peak_bytes(self) -> int | None:
        """The most memory that torch's allocator has held."""
        return int(torch.cuda.max_memory_reserved(self.torch_device))

    def allocate(self, nbytes: int) -> torch.Tensor:
        """One block of the GPU's memory."""
        try:
            return torch.empty(nbytes, dtype=torch.uint8, device=self.torch_device)
        except torch.OutOfMemoryError:
            raise OutOfDeviceMemory(f"{nbytes} bytes cannot be had, {self.free_bytes()} are free") from None

    def staging(self, *shape: int) -> torch.Tensor:
        """Pinned memory of the host; if none is available, pageable memory, for which copies block."""
        try:
            return torch.empty(shape, dtype=torch.float32, pin_memory=True)
        except RuntimeError as error:
            said = f"no pinned memory ({first_line(error)}): copies to and from the GPU are slower"
            if said not in self.notices:
                self.notices.append(said)
            return torch.empty(shape, dtype=torch.float32)

    def window(self, host: torch.Tensor) -> torch.Tensor | None:
        """See :class:`Device`. The first window is tested: a value that a kernel writes must arrive."""
        if self._windows is False or not host.is_pinned():
            return None
        try:
            view = mapped(host, self.torch_device)
            if self._windows is None:
                self._try(view, host)
            self._windows = True
        except (RuntimeError, TypeError, ValueError) as error:
            self._windows = False
            self.notices.append(f"kernels cannot reach pinned memory ({first_line(error)}): it is copied")
            return None
        return view

    def recorded(self, steps: Steps) -> Steps:
        """One CUDA graph of all steps. If it cannot be recorded, the steps stay as they are, and a notice
        says so. The run before the recording compiles kernels, loads them, and lets libraries allocate
        memory; none of that may happen while a graph is recorded. Raises OutOfDeviceMemory, KernelRefused and
        DeviceLost."""
        self.prepare(steps)
        if not self._graphs or self._rehearses:
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
            ticket = self._run(steps, _once)
            if not self._rehearses:
                ticket.wait()
        except HardwareError:
            raise
        except RuntimeError as error:
            raise self._failure(error) from None
        except Exception as error:  # noqa: BLE001 - Triton's errors derive from Exception
            raise KernelRefused(first_line(error)) from None

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Within it, what is recorded or prepared is run once, and nothing is kept."""
        self._rehearses = True
        try:
            yield
            self._stream.synchronize()
        finally:
            self._rehearses = False

    def submit(self, steps: Steps, *, awaited: bool = True) -> Ticket:
        """Queue the steps on the stream. If a launch finds no memory, torch's reserve is returned to the
        driver, and that launch is queued once more.
        """
        try:
            ticket = self._run(steps, _twice, awaited=awaited)
            if self._held_back and ticket.mark is not None:
                ticket.mark.query()
        except torch.OutOfMemoryError:
            raise MemoryEnded(f"out of VRAM, {self.free_bytes()} bytes are free") from None
        except Exception as error:  # noqa: BLE001 - Triton's errors derive from Exception
            raise DeviceLost(first_line(error)) from None
        return ticket

    def close(self) -> None:
        """Wait for queued work, and return all memory that is no longer in use to the driver."""
        # The loss of a device has been reported already.
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

    def _run(self, steps: Steps, do: Callable[[Work], None], *, awaited: bool = True) -> Timed | Passed:
        events = self._clock.events(len(steps) + 1) if self.timed else []
        with torch.inference_mode(), full_precision(), torch.cuda.stream(self._stream):
            if events:
                events[0].record(self._stream)
            for index, (_, work) in enumerate(steps, 1):
                do(work)
                if events:
                    events[index].record(self._stream)
            if not events:
                return self._marks.after(awaited=awaited or self._held_back)
        return Timed([name for name, _ in steps], events, self._clock)

    def _try(self, view: torch.Tensor, host: torch.Tensor) -> None:
        """Raise RuntimeError if a value that a kernel writes to ``view`` is not in ``host`` afterwards."""
        host.zero_()
        with torch.cuda.stream(self._stream):
            view.fill_(1)
        self._stream.synchronize()
        if not bool((host == 1).all()):
            raise RuntimeError("what a kernel wrote did not arrive")

    def _failure(self, error: RuntimeError) -> HardwareError:
        """What went wrong, in words."""
        if isinstance(error, torch.OutOfMemoryError):
            # The message of torch goes on about its own settings.
            return OutOfDeviceMemory("CUDA out of memory")
        return DeviceLost(first_line(error))


def _once(work: Work) -> None:
    work()


def _twice(work: Work) -> None:
    for piece in pieces_of(work):
        try:
            piece()
            continue
        except torch.OutOfMemoryError:
            pass  # the frames of the exception hold tensors until here
        torch.cuda.empty_cache()
        piece()


#: Names of graphs of several steps in a trace: a graph has the first of these names that one of its steps
#: has.
_GRAPH_NAMES = ("attention", "hot", "merge", "head")
