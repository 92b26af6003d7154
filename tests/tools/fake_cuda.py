"""``torch.cuda`` on a machine without a GPU: what is asked of it is noted, and what may not be asked is
refused as CUDA and torch refuse it. Tensors are the host's. A graph keeps the operations that were done while
it was recorded, and does the same ones to the same memory again.
"""

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from powerinfer_tools.engine.hot.devices import CudaDevice

Tensor = torch.Tensor


class FakeStream:
    """A stream; ``done``: what has certainly been done, of the marks that were queued."""

    def __init__(self, cuda: "FakeCuda") -> None:
        self.cuda, self.queued, self.done = cuda, 0, 0

    def synchronize(self) -> None:
        self.cuda.asked("synchronize")
        self.done = self.queued


class FakeEvent:
    """An event with a time."""

    def __init__(self, cuda: "FakeCuda", timing: bool) -> None:
        self._cuda, self._timing = cuda, timing
        self._mark: tuple[FakeStream, int, float] | None = None

    def record(self, stream: FakeStream) -> None:
        self._cuda.asked("record")
        if self._cuda.recording is not None:
            raise RuntimeError("an event of a graph says nothing of its replays")
        stream.queued += 1
        self._mark = (stream, stream.queued, self._cuda.tick())

    def query(self) -> bool:
        self._cuda.asked("query")
        return False

    def synchronize(self) -> None:
        self._cuda.asked("wait")
        if self._mark is None:
            raise RuntimeError("CUDA error: invalid resource handle")
        stream, place, _ = self._mark
        stream.done = max(stream.done, place)

    def elapsed_time(self, end: "FakeEvent") -> float:
        """Milliseconds, in single precision."""
        marks = [self._mark, end._mark]
        if None in marks or not (self._timing and end._timing):
            raise RuntimeError("CUDA error: invalid resource handle")
        (a, first, start), (b, last, stop) = [mark for mark in marks if mark is not None]
        if first > a.done or last > b.done:
            raise RuntimeError("CUDA error: device not ready")
        if last < first:
            raise RuntimeError("an event is earlier than what it is counted from")
        return float(np.float32(stop - start))


class FakeGraph:
    """Operations, to be done again."""

    def __init__(self, cuda: "FakeCuda") -> None:
        self._cuda = cuda
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self.whole = False

    def replay(self) -> None:
        self._cuda.asked("replay")
        if not self.whole:
            raise RuntimeError("replay of a graph that was not recorded")
        if self._cuda.current is self._cuda.first:
            raise RuntimeError("a replay on the first stream")
        for function, args, kwargs, made in self.operations:
            found = function(*args, **kwargs)
            for old, new in zip(tree_flatten(made)[0], tree_flatten(found)[0], strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class _Recorder(TorchDispatchMode):
    def __init__(self, graph: FakeGraph) -> None:
        super().__init__()
        self._graph = graph

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        self._graph.operations.append((function, args, kwargs or {}, made))
        return made


class _Current:
    """``with torch.cuda.stream(…)``."""

    def __init__(self, cuda: "FakeCuda", stream: FakeStream) -> None:
        self._cuda, self._stream, self._before = cuda, stream, cuda.current

    def __enter__(self) -> None:
        self._before, self._cuda.current = self._cuda.current, self._stream

    def __exit__(self, *_: object) -> None:
        self._cuda.current = self._before


class _Recording:
    """``with torch.cuda.graph(…)``, which leaves its stream current where the end fails, as torch's does."""

    def __init__(
        self, cuda: "FakeCuda", graph: FakeGraph, *, pool: object, stream: FakeStream, capture_error_mode: str
    ) -> None:
        assert pool == "pool"
        assert capture_error_mode == "thread_local"
        self._cuda, self._graph, self._stream = cuda, graph, _Current(cuda, stream)
        self._recorder = _Recorder(graph)

    def __enter__(self) -> None:
        self._cuda.asked("begin")
        self._stream.__enter__()
        self._cuda.recording = self._graph
        self._recorder.__enter__()

    def __exit__(self, *error: object) -> None:
        self._recorder.__exit__(*error)
        self._cuda.recording = None
        self._cuda.asked("end")
        if error[0] is not None:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture\nmore")
        self._graph.whole = True
        self._stream.__exit__(*error)


class FakeCuda:
    """``log``: what was asked, in order; ``fail``: an error to raise at the n-th time that something is
    asked; ``ms``: how long a mark takes. ``libraries``: bytes that they take once memory was asked for; None:
    how much is free does not change."""

    def __init__(self, free: int = 1 << 30) -> None:
        self.free, self.log, self.ms = free, list[str](), 0.25
        self.fail: dict[tuple[str, int], Exception] = {}
        self.first = FakeStream(self)
        self.current, self.recording = self.first, None
        self._now = 0.0
        self.pinned = self.timing = 0
        self.libraries: int | None = None
        self._storages: list[weakref.ref[torch.UntypedStorage]] = []

    def asked(self, what: str) -> None:
        """Note it, or raise what is to be raised."""
        self.log.append(what)
        error = self.fail.get((what, self.log.count(what)))
        if error is not None:
            raise error
        if self.recording is not None and what not in ("end", "kernel"):
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing: {what}")

    def free_now(self) -> int:
        """Bytes, by what of the memory is held."""
        if self.libraries is None:
            return self.free
        storages = [storage for ref in self._storages if (storage := ref()) is not None]
        used = self.libraries if "allocate" in self.log else 0
        return self.free - used - sum(storage.nbytes() for storage in storages)

    def tick(self) -> float:
        """Milliseconds since the beginning."""
        self._now += self.ms
        return self._now

    def event(self, *, enable_timing: bool) -> FakeEvent:
        """An event; how many have a time is counted."""
        self.timing += enable_timing
        return FakeEvent(self, enable_timing)

    def kernel(self) -> None:
        """A piece of work in a test."""
        self.asked("kernel")
        if self.current is self.first:
            raise RuntimeError("a kernel on the first stream")

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Be ``torch.cuda``; tensors that are asked for there are the host's."""
        empty, ones = torch.empty, torch.ones

        def made(*shape: Any, **options: Any) -> Tensor:
            if options.pop("pin_memory", False):
                self.asked("pin")
                self.pinned += 1
            elif options.get("device") == torch.device("cpu"):
                self.asked("allocate")
                tensor = empty(*shape, **options)
                self._storages.append(weakref.ref(tensor.untyped_storage()))
                return tensor
            return empty(*shape, **options)

        monkeypatch.setattr(CudaDevice, "torch_device", torch.device("cpu"))
        monkeypatch.setattr(torch, "empty", made)
        monkeypatch.setattr(torch, "ones", lambda *shape, **_: ones(*shape))
        parts: dict[str, Callable[..., Any]] = {
            "Stream": lambda _: FakeStream(self),
            "Event": self.event,
            "CUDAGraph": lambda: FakeGraph(self),
            "graph": lambda *a, **k: _Recording(self, *a, **k),
            "stream": lambda stream: _Current(self, stream),
            "graph_pool_handle": lambda: "pool",
            "mem_get_info": lambda _: (self.free_now(), self.free),
            "max_memory_reserved": lambda _: 123,
            "empty_cache": lambda: self.asked("empty cache"),
            "is_available": lambda: True,
            "get_device_capability": lambda _: (7, 0),
        }
        for name, part in parts.items():
            monkeypatch.setattr(torch.cuda, name, part)
