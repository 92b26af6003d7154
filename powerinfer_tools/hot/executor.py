"""The hot side in torch: one executor for CUDA and for the CPU device.

A layer is three steps in the device's queue (copy in, compute, copy out) and one wait; nothing else
synchronises. The caller computes the cold neurons in between. Layers whose attention is on the device are
:mod:`powerinfer_tools.hot.stream`'s. If the device is lost, its neurons and the head move to torch's CPU
device, which takes up the same piece of work again from the same input, so no token is computed wrongly; that
is said once. A KV cache that was on the device is lost with it, and so is the text: that is an error.
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
from powerinfer_tools.hot.head import HotHead
from powerinfer_tools.hot.placement import HotSize
from powerinfer_tools.hot.predictors import HotPredictor, Naming
from powerinfer_tools.hot.stream import HotStream

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


@dataclass(frozen=True)
class Neurons:
    """The hot neurons of layers whose attention is the host's (None: a layer has none, or is the stream's).

    ``rounded``: some rows take the input as the integer kernels round it. ``predictors`` of such layers,
    where they are on the device; ``stream``, the host's and the device's end (T, width) of what some of them
    read beside the input, is empty where none does. ``naming`` is also the stream's.
    """

    layers: Sequence[HotFFN | None]
    exchange: Exchange
    scratch: Scratch
    rounded: bool
    predictors: Sequence[HotPredictor | None]
    naming: Naming
    stream: tuple[torch.Tensor, torch.Tensor]


class Backend:
    """All that is on one device; ``stream`` and ``head`` are None where they are the host's."""

    def __init__(
        self, device: Device, neurons: Neurons, stream: HotStream | None, head: HotHead | None
    ) -> None:
        self.device, self.stream, self.head = device, stream, head
        self.layers, self._exchange, self._scratch = neurons.layers, neurons.exchange, neurons.scratch
        self._rounded, self._stream = neurons.rounded, neurons.stream
        self.predictors, self.naming = neurons.predictors, neurons.naming
        self._decode = [
            [device.recorded(steps) for steps in self._steps(index, 1)] if layer else []
            for index, layer in enumerate(self.layers)
        ]
        sources = () if head is None else (False,) if stream is None else (False, True)
        self._head_decode = {stays: device.recorded(self._head_steps(0, 1, stays=stays)) for stays in sources}

    def prepare(self, tokens: int) -> None:
        """Take now what batches of ``tokens`` take, and begin counting."""
        for index, layer in enumerate(self.layers):
            for steps in self._steps(index, tokens) if layer else ():
                self.device.prepare(steps)
        found = [predictor for predictor in self.predictors if predictor is not None]
        if self.stream is not None:
            self.stream.prepare(tokens)
            found += [layer.predictor for layer in self.stream.layers if layer and layer.predictor]
        if self.head is not None:
            self.device.prepare(self._head_steps(0, len(self.head.logits), stays=False))
        for predictor in found:
            # Whatever the runs so far had as input has been counted.
            self.device.prepare((("reset", predictor.forget),))

    def launch(self, layer: int, normed: Floats, acts: Activations | None, x: Floats) -> list[Ticket]:
        """Queue one layer; the last ticket is that of its sum, one before it says which neurons are named."""
        self._exchange.stage(normed, acts if self._rounded else None)
        tokens = len(normed)
        if self._reads_stream(layer):
            self._stream[0][:tokens].numpy()[...] = x
        pieces = self._decode[layer] if tokens == 1 else self._steps(layer, tokens)
        return [self.device.submit(steps) for steps in pieces]

    def output(self, tokens: int) -> Floats:
        """The sum of the layer that was waited for, a view."""
        result: Floats = self._exchange.host_out[:tokens].numpy()
        return result

    def logits(self, x: Floats | None, first: int, last: int) -> Ticket:
        """Queue the head for rows of the stream: ``x`` (last - first, width), or rows ``first`` to ``last``
        of the device's own where that is None."""
        assert self.head is not None
        stays = x is None
        if x is not None:
            first, last = 0, len(x)
            self.head.landing[:last].numpy()[...] = x
        one = self._head_decode[stays] if (first, last) == (0, 1) else None
        return self.device.submit(one or self._head_steps(first, last, stays=stays))

    def close(self) -> None:
        """Forget all tensors, then close the device."""
        self.layers, self._decode, self.predictors = (), [], ()
        self._head_decode = {}
        self.stream = self.head = None
        del self._exchange, self._scratch, self._stream, self.naming
        self.device.close()

    def _head_steps(self, first: int, last: int, *, stays: bool) -> Steps:
        """The head for rows ``first`` to ``last`` of the stream, which ``stays`` on the device, or comes from
        the host."""
        assert self.head is not None
        count = last - first
        steps: Steps = ()
        if stays:
            assert self.stream is not None
            rows = self.stream.rows(first, last)
        else:
            rows = self.head.rows.exact[:count]
            steps = (("copy in", partial(_copy, self.head.landing[:count], rows)),)
        head = ("head", partial(self.head.compute, rows))
        return (*steps, head, ("copy out", partial(self.head.copy_out, count)))

    def _reads_stream(self, layer: int) -> bool:
        predictor = self.predictors[layer]
        return predictor is not None and predictor.scorer.residual

    def _steps(self, layer: int, tokens: int) -> list[Steps]:
        """One piece of work, or where the device predicts, two."""
        hot, predictor, exchange = self.layers[layer], self.predictors[layer], self._exchange
        assert hot is not None
        inputs, out = exchange.device_in.first(tokens), exchange.device_out[:tokens]
        first: Steps = (("copy in", partial(exchange.copy_in, tokens)),)
        named = None
        if predictor is not None:
            x = inputs.exact
            if predictor.scorer.residual:
                here, x = (end[:tokens] for end in self._stream)
                first = (*first, ("copy in", partial(_copy, here, x)))
            cold = hot.neurons < len(predictor.threshold)
            first = (*first, *self.naming.steps(predictor, inputs, x, cold=cold))
            named = self.naming.of_hot(predictor, tokens)
        rest: Steps = (
            ("hot", partial(hot.compute, inputs, self._scratch, out, named)),
            ("copy out", partial(exchange.copy_out, tokens)),
        )
        return [(*first, *rest)] if predictor is None else [first, rest]


def _copy(source: torch.Tensor, target: torch.Tensor) -> None:
    target.copy_(source, non_blocking=True)


@dataclass(frozen=True)
class _Launched:
    layer: int
    normed: Floats
    acts: Activations | None
    x: Floats
    tickets: list[Ticket]


class TorchHotSide:
    """What of a model is on a device; ``spare`` makes the backend that takes over from a lost one, None where
    nothing can."""

    def __init__(
        self, backend: Backend, spare: Callable[[], Backend] | None, size: HotSize, notices: Sequence[str]
    ) -> None:
        self._backend, self._spare, self._size = backend, spare, size
        self._running: _Launched | None = None
        self._queued: list[tuple[int | None, Ticket]] = []
        self.seconds = self.waiting_seconds = 0.0
        self.spans: list[tuple[int | None, Span]] = []
        self.notices: list[str] = list(notices)
        streamed = backend.stream.layers if backend.stream else (None,) * len(backend.layers)
        self._there = [layer is not None for layer in streamed]
        ffns = (there.ffn if there else ffn for there, ffn in zip(streamed, backend.layers, strict=True))
        self._hot = [ffn.neurons if ffn else 0 for ffn in ffns]

    @property
    def nbytes(self) -> int:
        """Device memory for weights, KV cache and scratch, in bytes."""
        return self._size.total

    @property
    def weight_bytes(self) -> int:
        """Device memory for weights, in bytes."""
        return self._size.weights

    @property
    def stored_bytes(self) -> int:
        """Device memory for weights and KV cache, in bytes."""
        return self._size.weights + self._size.cache

    @property
    def peak_bytes(self) -> int | None:
        """See :class:`powerinfer_tools.hot.HotSide`."""
        return self._backend.device.peak_bytes()

    @property
    def has_head(self) -> bool:
        """Whether the output norm and the head are here."""
        return self._backend.head is not None

    def has_attention(self, layer: int) -> bool:
        """Whether the attention block of ``layer`` is here."""
        return self._there[layer]

    def hot_neurons(self, layer: int) -> int:
        """Neurons of ``layer`` that are computed here."""
        return self._hot[layer]

    def has_predictor(self, layer: int) -> bool:
        """Whether the predictor of ``layer`` is here."""
        return self._predictor(layer) is not None

    @property
    def left_out(self) -> int:
        """Hot neurons that were not named so far, over all tokens."""
        self._wait(len(self._queued))
        predictors = [self._predictor(layer) for layer in range(len(self._hot))]
        return sum(int(found.left_out.item()) for found in predictors if found)

    def launch(self, layer: int, normed: Floats, acts: Activations | None, x: Floats) -> None:
        """Begin ``layer``; see :class:`powerinfer_tools.hot.HotSide`."""
        assert self._running is None
        try:
            tickets = self._backend.launch(layer, normed, acts, x)
        except DeviceLost as error:
            self._move(error)
            tickets = self._backend.launch(layer, normed, acts, x)
        self._running = _Launched(layer, normed, acts, x, tickets)

    def named(self, layer: int, out: Floats) -> None:
        """Wait for what the predictor of the begun layer says of its cold neurons."""
        running = self._running
        if running is not None:
            self._finish(running, 1)
        predictor = self._predictor(layer)
        assert predictor is not None
        out[...] = self._backend.naming.of_cold(predictor, len(out))

    def collect(self, out: Floats) -> None:
        """Wait for the launched layer and copy its sum to ``out``."""
        assert self._running is not None
        self._finish(self._running, len(self._running.tickets))
        self._running = None
        out[...] = self._backend.output(len(out))

    def enter(self, x: Floats, position: int) -> None:
        """The residual stream comes here; see :class:`powerinfer_tools.hot.HotSide`."""
        # What the last pass copied from the host may be overwritten from here on.
        self._wait(len(self._queued))
        self._queue(None, lambda stream: [stream.enter(x, position)])

    def begin(self, layer: int, tokens: int, position: int) -> None:
        """Begin a layer whose attention is here."""
        self._queue(layer, lambda stream: stream.begin(layer, tokens, position))

    def ffn_input(self, layer: int, normed: Floats, shown: Floats) -> None:
        """Wait for the input of the begun layer's FFN."""
        # The hot part is queued behind it, and goes on.
        self._wait(len(self._queued) - 1)
        stream = self._backend.stream
        assert stream is not None
        found, residual = stream.input(len(normed))
        normed[...] = found
        begun = stream.layers[layer]
        if begun is not None and begun.shows_stream:
            shown[...] = residual

    def merge(self, layer: int, cold: Floats | None, tokens: int) -> None:
        """The sum of the begun layer's FFN joins the stream."""
        self._queue(layer, lambda stream: stream.merge(layer, cold, tokens))

    def leave(self, x: Floats) -> None:
        """Wait for the stream."""
        self._queue(None, lambda stream: [stream.leave(len(x))])
        self._wait(len(self._queued))
        assert self._backend.stream is not None
        x[...] = self._backend.stream.input(len(x))[1]

    def logits(self, x: Floats | None, first: int, last: int) -> Floats:
        """See :class:`powerinfer_tools.hot.HotSide`."""
        try:
            return self._logits(x, first, last)
        except DeviceLost as error:
            self._move(error)
            return self._logits(x, first, last)

    def close(self) -> None:
        """Free the device memory and end the queue."""
        self._backend.close()

    def _logits(self, x: Floats | None, first: int, last: int) -> Floats:
        self._queued.append((None, self._backend.logits(x, first, last)))
        self._wait(len(self._queued))
        assert self._backend.head is not None
        logits: Floats = self._backend.head.host[: last - first].numpy()
        return logits

    def _predictor(self, layer: int) -> HotPredictor | None:
        """That of ``layer``, where it is here."""
        stream = self._backend.stream.layers[layer] if self._backend.stream else None
        return self._backend.predictors[layer] if stream is None else stream.predictor

    def _finish(self, running: _Launched, count: int) -> None:
        """Wait for the first ``count`` pieces of a launched layer that were not waited for."""
        started = time.perf_counter()
        waited, running.tickets[:] = running.tickets[:count], running.tickets[count:]
        try:
            spans = [ticket.wait() for ticket in waited]
        except DeviceLost as error:
            self._move(error)
            again = self._backend.launch(running.layer, running.normed, running.acts, running.x)
            spans, running.tickets[:] = [ticket.wait() for ticket in again], []
        for found in spans:
            self._count(running.layer, found)
        self.waiting_seconds += time.perf_counter() - started

    def _queue(self, layer: int | None, work: Callable[[HotStream], list[Ticket]]) -> None:
        assert self._backend.stream is not None
        try:
            self._queued += [(layer, ticket) for ticket in work(self._backend.stream)]
        except DeviceLost as error:
            self._move(error)

    def _wait(self, count: int) -> None:
        """Wait for the first ``count`` pieces of queued work."""
        started = time.perf_counter()
        waited, self._queued = self._queued[:count], self._queued[count:]
        try:
            # Work is done in order: when the last is done, there is nothing to wait for in the others.
            spans = [ticket.wait() for _, ticket in reversed(waited)]
        except DeviceLost as error:
            if self._backend.stream is None:
                raise
            self._move(error)
        for (layer, _), found in zip(waited, reversed(spans), strict=True):
            self._count(layer, found)
        self.waiting_seconds += time.perf_counter() - started

    def _count(self, layer: int | None, spans: Sequence[Span]) -> None:
        self.seconds += sum(span.end - span.start for span in spans)
        self.spans += [(layer, span) for span in spans]

    def _move(self, error: DeviceLost) -> None:
        if self._backend.stream is not None:
            raise DeviceLost(
                f"the GPU stopped working ({error}), and the KV cache in its memory is lost; begin again, "
                "with --device none if the GPU does not come back"
            )
        if self._spare is None:
            raise error
        # What a lost device has counted is lost with it.
        lost, self._backend, self._spare = self._backend, self._spare(), None
        self._queued = []
        self.notices.append(
            f"the GPU stopped working ({error}); torch computes its part on the CPU from here on"
        )
        self._lost = lost  # its tensors cannot be freed without the device
