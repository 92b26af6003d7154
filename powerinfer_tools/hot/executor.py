"""The hot side in torch: one executor for CUDA and for the CPU device.

A layer is three steps in the device's queue (copy in, compute, copy out) and one wait; nothing else
synchronises. The caller computes the cold neurons in between. If the device is lost, its neurons move to
torch's CPU device, which takes up the same layer again from the same input, so no token is computed wrongly;
that is said once.
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
from powerinfer_tools.hot.ffn import HotFFN, Inputs, Scratch

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Exchange:
    """What the two sides exchange, float32 (T, width): inputs and output, on the host and on the device."""

    host_in: Inputs
    host_out: torch.Tensor
    device_in: Inputs
    device_out: torch.Tensor

    def stage(self, normed: Floats, acts: Activations | None) -> None:
        """Put the inputs where the device copies them from."""
        tokens = len(normed)
        exact, rounded = self.host_in.exact, self.host_in.rounded
        shared = exact is rounded
        if acts is None or not shared:
            exact[:tokens].numpy()[...] = normed
        if acts is not None:
            scales = acts.d[:tokens, :, None]
            quants = acts.q[:tokens].reshape(*acts.d[:tokens].shape, -1)
            np.multiply(quants, scales, out=rounded[:tokens].numpy().reshape(quants.shape))

    def copy_in(self, tokens: int) -> None:
        """Host to device."""
        there, here = self.device_in.first(tokens), self.host_in.first(tokens)
        there.rounded.copy_(here.rounded, non_blocking=True)
        if self.device_in.exact is not self.device_in.rounded:
            there.exact.copy_(here.exact, non_blocking=True)

    def copy_out(self, tokens: int) -> None:
        """Device to host."""
        self.host_out[:tokens].copy_(self.device_out[:tokens], non_blocking=True)


class Backend:
    """All hot layers on one device."""

    def __init__(
        self, device: Device, layers: Sequence[HotFFN | None], exchange: Exchange, scratch: Scratch, *,
        rounded: bool,
    ) -> None:  # fmt: skip
        self.device, self.layers, self._exchange, self._scratch = device, layers, exchange, scratch
        self._rounded = rounded
        self._decode = [device.recorded(self._steps(layer, 1)) if layer else () for layer in layers]

    def launch(self, layer: int, normed: Floats, acts: Activations | None) -> Ticket:
        """Queue one layer."""
        hot = self.layers[layer]
        assert hot is not None
        self._exchange.stage(normed, acts if self._rounded else None)
        tokens = len(normed)
        return self.device.submit(self._decode[layer] if tokens == 1 else self._steps(hot, tokens))

    def output(self, tokens: int) -> Floats:
        """The sum of the layer that was waited for, a view."""
        result: Floats = self._exchange.host_out[:tokens].numpy()
        return result

    def close(self) -> None:
        """Forget all tensors, then close the device."""
        self.layers, self._decode = (), []
        del self._exchange, self._scratch
        self.device.close()

    def _steps(self, hot: HotFFN, tokens: int) -> Steps:
        exchange = self._exchange
        inputs, out = exchange.device_in.first(tokens), exchange.device_out[:tokens]
        return (
            ("copy in", partial(exchange.copy_in, tokens)),
            ("hot", partial(hot.compute, inputs, self._scratch, out)),
            ("copy out", partial(exchange.copy_out, tokens)),
        )


@dataclass(frozen=True)
class _Launched:
    layer: int
    normed: Floats
    acts: Activations | None
    ticket: Ticket


class TorchHotSide:
    """The hot neurons of a model; ``spare`` makes the backend that takes over from a lost device."""

    def __init__(
        self, backend: Backend, spare: Callable[[], Backend] | None, nbytes: int, notices: Sequence[str] = ()
    ) -> None:
        self._backend, self._spare, self._nbytes = backend, spare, nbytes
        self._hot = [layer.neurons if layer else 0 for layer in backend.layers]
        self._running: _Launched | None = None
        self.seconds = self.waiting_seconds = 0.0
        self.notices: list[str] = list(notices)

    @property
    def nbytes(self) -> int:
        """Device memory for weights and scratch, in bytes."""
        return self._nbytes

    @property
    def peak_bytes(self) -> int | None:
        """See :class:`powerinfer_tools.hot.HotSide`."""
        return self._backend.device.peak_bytes()

    def hot_neurons(self, layer: int) -> int:
        """Neurons of ``layer`` that are computed here."""
        return self._hot[layer]

    def launch(self, layer: int, normed: Floats, acts: Activations | None) -> None:
        """Begin ``layer``; see :class:`powerinfer_tools.hot.HotSide`."""
        assert self._running is None
        try:
            ticket = self._backend.launch(layer, normed, acts)
        except DeviceLost as error:
            self._move(error)
            ticket = self._backend.launch(layer, normed, acts)
        self._running = _Launched(layer, normed, acts, ticket)

    def collect(self, out: Floats) -> list[Span]:
        """Wait for the launched layer and copy its sum to ``out``."""
        started = time.perf_counter()
        assert self._running is not None
        running, self._running = self._running, None
        try:
            spans = running.ticket.wait()
        except DeviceLost as error:
            self._move(error)
            spans = self._backend.launch(running.layer, running.normed, running.acts).wait()
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
            f"the GPU stopped working ({error}); torch computes its neurons on the CPU from here on"
        )
        self._lost = lost  # its tensors cannot be freed without the device
