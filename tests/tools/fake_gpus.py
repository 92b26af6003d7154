"""Devices that tests make up, where there is no GPU: torch's CPU device with other memory, another queue, or
a fault."""

import pytest
import torch

from powerinfer_tools.engine.hot import Span, devices, opening
from powerinfer_tools.engine.hot.devices import CpuDevice, Steps, Ticket
from powerinfer_tools.engine.hot.faults import DeviceLost, OutOfDeviceMemory

MIB = 1 << 20


class FakeGpu(CpuDevice):
    """A device with ``free`` bytes, which counts what is asked of it; ``largest``: its largest block."""

    def __init__(self, free: int, largest: int | None = None) -> None:
        super().__init__()
        self.free, self.largest, self.asked = free, largest, list[int]()

    def free_bytes(self) -> int | None:
        return self.free

    def allocate(self, nbytes: int) -> torch.Tensor:
        self.asked.append(nbytes)
        if nbytes > (self.free if self.largest is None else self.largest):
            raise OutOfDeviceMemory(f"{nbytes} bytes cannot be had, {self.free} are free")
        return super().allocate(nbytes)


def on(monkeypatch: pytest.MonkeyPatch, device: CpuDevice, *, fused: bool = False) -> None:
    """Let every engine that asks for cuda have ``device``."""

    def open_on(model: object, name: str, vram: int | None, work: object, progress: object) -> object:
        return opening.open_side(model, device, vram, work, fused=fused)  # type: ignore[arg-type]

    monkeypatch.setattr(opening, "open_on", open_on)


class Deferred:
    """A ticket whose work is done only when it is waited for, or something that was queued later."""

    def __init__(self, steps: Steps, gpu: "LatestGpu") -> None:
        self.steps, self._gpu = steps, gpu
        self.spans: list[Span] | None = None

    def wait(self) -> list[Span]:
        if self.spans is None:
            self._gpu.finish(self)
        assert self.spans is not None
        return self.spans


class LatestGpu(FakeGpu):
    """Does everything at the latest moment that is allowed: whoever reads too early, or overwrites an input
    before it is waited for, computes something else. ``stops``: waits that found something to do."""

    def __init__(self) -> None:
        super().__init__(1 << 30)
        self.queue: list[Deferred] = []
        self.stops: list[int] = []

    def submit(self, steps: Steps, *, awaited: bool = True) -> Ticket:
        self.queue.append(Deferred(steps, self))
        return self.queue[-1]

    def finish(self, last: Deferred) -> None:
        """Do everything that was queued up to ``last``."""
        self.stops.append(len(self.queue))
        while last.spans is None:
            first = self.queue.pop(0)
            first.spans = devices._run_timed(first.steps)


class FailingGpu(FakeGpu):
    """Stops working at the ``last`` piece of work."""

    def __init__(self, last: int, *, when: str) -> None:
        super().__init__(1 << 30)
        self._left, self._when = last, when

    def submit(self, steps: Steps, *, awaited: bool = True) -> Ticket:
        self._left -= 1
        if self._left > 0:
            return super().submit(steps, awaited=awaited)
        if self._when == "submit":
            raise DeviceLost("an illegal thing happened")
        return Failing()


class Failing:
    """A ticket of a device that is lost."""

    def wait(self) -> list[Span]:
        raise DeviceLost("an illegal thing happened")
