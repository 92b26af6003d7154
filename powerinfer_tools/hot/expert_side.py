"""The hot side of a mixture of experts: one executor for CUDA and for torch's CPU device.

A layer is three steps in the device's queue (copy in, compute, copy out) and one wait, as for neurons; a
layer whose hot experts no token takes is none. If the device is lost, its experts move to torch's CPU device,
which takes up the same layer again from the same input; that is said once.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from powerinfer_kernels import Activations
from powerinfer_tools.hot import Span
from powerinfer_tools.hot.devices import Device, DeviceLost, Steps, Ticket
from powerinfer_tools.hot.executor import Exchange
from powerinfer_tools.hot.expert_routes import Route
from powerinfer_tools.hot.experts import ExpertScratch, HotExperts, Routes, Taken
from powerinfer_tools.hot.placement import HotSize

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class RouteExchange:
    """Which tokens take which experts, on both sides: float32 (2, T · experts of a token), weights, then rows
    of tokens as int32."""

    host: torch.Tensor
    device: torch.Tensor

    def stage(self, routes: Sequence[Route]) -> list[Taken]:
        """Write ``routes`` where the device copies them from."""
        weights, tokens = self.host[0].numpy(), self.host[1].view(torch.int32).numpy()
        taken, first = [], 0
        for route in routes:
            last = first + len(route.tokens)
            weights[first:last], tokens[first:last] = route.weights, route.tokens
            taken.append(Taken(route.expert, first, last))
            first = last
        return taken

    def copy_in(self, count: int) -> None:
        """Host to device, the first ``count`` of each: two copies, as one with a gap is not direct."""
        for there, here in zip(self.device, self.host, strict=True):
            there[:count].copy_(here[:count], non_blocking=True)

    @property
    def there(self) -> Routes:
        """As the device reads them."""
        return Routes(self.device[0], self.device[1].view(torch.int32))


class ExpertBackend:
    """All hot experts on one device; ``rounded``: some rows take the input as the integer kernels round
    it."""

    def __init__(
        self,
        device: Device,
        layers: Sequence[HotExperts | None],
        exchange: Exchange,
        routes: RouteExchange,
        scratch: ExpertScratch,
        *,
        rounded: bool,
    ) -> None:
        self.device, self.layers = device, layers
        self._exchange, self._routes, self._scratch, self._rounded = exchange, routes, scratch, rounded

    def launch(self, layer: int, normed: Floats, acts: Activations | None, routes: Sequence[Route]) -> Ticket:
        """Queue one layer."""
        hot, exchange, tokens = self.layers[layer], self._exchange, len(normed)
        assert hot is not None
        exchange.stage(normed, acts if self._rounded else None)
        taken = self._routes.stage(routes)
        inputs, out = exchange.device_in.first(tokens), exchange.device_out[:tokens]
        steps: Steps = (
            ("copy in", partial(self._copy_in, tokens, taken[-1].last)),
            ("hot", partial(hot.compute, inputs, taken, self._routes.there, self._scratch, out)),
            ("copy out", partial(exchange.copy_out, tokens)),
        )
        return self.device.submit(steps)

    def output(self, tokens: int) -> Floats:
        """The sum of the layer that was waited for, a view."""
        result: Floats = self._exchange.host_out[:tokens].numpy()
        return result

    def close(self) -> None:
        """Forget all tensors, then close the device."""
        self.layers = ()
        del self._exchange, self._routes, self._scratch
        self.device.close()

    def _copy_in(self, tokens: int, count: int) -> None:
        self._exchange.copy_in(tokens)
        self._routes.copy_in(count)


@dataclass(frozen=True)
class _Launched:
    layer: int
    normed: Floats
    acts: Activations | None
    routes: Sequence[Route]
    ticket: Ticket


class TorchExpertSide:
    """See :class:`powerinfer_tools.hot.expert_routes.HotExpertSide`; ``spare`` makes the backend that takes
    over from a lost device."""

    def __init__(
        self,
        backend: ExpertBackend,
        spare: Callable[[], ExpertBackend] | None,
        size: HotSize,
        notices: Sequence[str] = (),
    ) -> None:
        self._backend, self._spare = backend, spare
        self.nbytes, self.weight_bytes = size.total, size.weights
        self._hot = [frozenset(layer.experts) if layer else frozenset[int]() for layer in backend.layers]
        self._running: _Launched | None = None
        self.seconds = self.waiting_seconds = 0.0
        self.notices: list[str] = list(notices)

    @property
    def peak_bytes(self) -> int | None:
        """The most device memory that was held; None where the device does not count it."""
        return self._backend.device.peak_bytes()

    def hot_experts(self, layer: int) -> frozenset[int]:
        """The experts of ``layer`` that are computed here."""
        return self._hot[layer]

    def launch(self, layer: int, normed: Floats, acts: Activations | None, routes: Sequence[Route]) -> None:
        """Begin ``layer``."""
        assert self._running is None
        try:
            ticket = self._backend.launch(layer, normed, acts, routes)
        except DeviceLost as error:
            self._move(error)
            ticket = self._backend.launch(layer, normed, acts, routes)
        self._running = _Launched(layer, normed, acts, routes, ticket)

    def collect(self, out: Floats) -> list[Span]:
        """Wait for the launched layer and copy its sum to ``out``."""
        started = time.perf_counter()
        assert self._running is not None
        run, self._running = self._running, None
        try:
            spans = run.ticket.wait()
        except DeviceLost as error:
            self._move(error)
            spans = self._backend.launch(run.layer, run.normed, run.acts, run.routes).wait()
        out[...] = self._backend.output(len(out))
        self.waiting_seconds += time.perf_counter() - started
        self.seconds += sum(span.end - span.start for span in spans)
        return spans

    def close(self) -> None:
        """Free the device memory and end the queue."""
        self._backend.close()

    def _move(self, error: DeviceLost) -> None:
        if self._spare is None:
            raise error
        lost, self._backend, self._spare = self._backend, self._spare(), None
        self.notices.append(
            f"the GPU stopped working ({error}); torch computes its experts on the CPU from here on"
        )
        self._lost = lost  # its tensors cannot be freed without the device
