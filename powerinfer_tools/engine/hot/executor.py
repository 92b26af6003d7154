"""The hot side in torch: one executor for CUDA and for the CPU device.

The caller computes cold neurons (or experts) while the device works. If the device is lost, its neurons,
experts and the head move to torch's CPU device. The CPU device repeats the same piece of work from the same
input, so no token is computed wrongly; a notice says so once. A KV cache on the device is lost with the
device, and so is the text: that is an error.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from powerinfer_kernels import Activations
from powerinfer_tools.engine.hot import Span, loss
from powerinfer_tools.engine.hot.backend import Backend
from powerinfer_tools.engine.hot.cache import fill
from powerinfer_tools.engine.hot.devices import Ticket, arithmetic
from powerinfer_tools.engine.hot.experts import HotExperts, WholeFFN
from powerinfer_tools.engine.hot.faults import DeviceLost, MemoryEnded
from powerinfer_tools.engine.hot.hot_ffn import HotFFN
from powerinfer_tools.engine.hot.prediction import HotPredictor
from powerinfer_tools.engine.hot.routes import Route
from powerinfer_tools.engine.hot.stream import HotStream
from powerinfer_tools.engine.hot.stretches import Queued
from powerinfer_tools.model.device_memory import HotSize

Floats = npt.NDArray[np.float32]
#: The layers of the steps that the head queues: its input, the head, its output.
_NO_LAYER = (None, None, None)


@dataclass(frozen=True)
class _Launched:
    layer: int
    normed: Floats
    acts: Activations | None
    x: Floats
    routes: Sequence[Route]
    tickets: list[Ticket]


class TorchHotSide:
    """The part of a model on a device; ``spare`` makes the backend that replaces a lost one, None if nothing
    can replace it."""

    def __init__(
        self,
        backend: Backend,
        spare: Callable[[], Backend] | None,
        size: HotSize,
        notices: Sequence[str],
        taken: int = 0,
    ) -> None:
        """``taken``: bytes by which the device's free memory has fallen since before the first allocation; 0
        if unknown."""
        self._backend, self._spare, self._size, self._taken = backend, spare, size, taken
        self._running: _Launched | None = None
        self._queued: list[Queued] = []
        self._before_turn = 0  # how many of them come up to the host's next turn
        self.seconds = self.waiting_seconds = 0.0
        self.spans: list[tuple[int | None, Span]] = []
        self.notices: list[str] = list(notices)
        streamed = backend.stream.layers if backend.stream else (None,) * len(backend.layers)
        self._there = [layer is not None for layer in streamed]
        ffns = (
            hot_layer.ffn if hot_layer else ffn
            for hot_layer, ffn in zip(streamed, backend.layers, strict=True)
        )
        self._counted: list[tuple[int, int, int] | None] | None = None  # once it is closed
        self._hot: list[int] = []
        self._hot_experts: list[frozenset[int]] = []
        for ffn in ffns:
            self._hot.append(ffn.neurons if isinstance(ffn, HotFFN | WholeFFN) else 0)
            self._hot_experts.append(frozenset(ffn.experts if isinstance(ffn, HotExperts) else ()))

    @property
    def nbytes(self) -> int:
        """Device memory for weights, KV cache and scratch, in bytes."""
        return self._size.total

    @property
    def weight_bytes(self) -> int:
        """Device memory for weights that every token reads, in bytes."""
        return self._size.weights - self._size.experts

    @property
    def stored_bytes(self) -> int:
        """Device memory for weights and KV cache, in bytes."""
        return self._size.weights + self._size.cache

    @property
    def peak_bytes(self) -> int | None:
        """See :class:`powerinfer_tools.engine.hot.HotSide`."""
        counted = self._backend.device.peak_bytes()
        return None if counted is None else max(counted, self._taken)

    @property
    def has_head(self) -> bool:
        """Whether the output norm and the head are here."""
        return self._backend.head is not None

    @property
    def identity(self) -> tuple[object, ...]:
        """See :class:`powerinfer_tools.engine.hot.HotSide`."""
        places = (tuple(self._there), self.has_head, tuple(map(self.has_predictor, range(len(self._hot)))))
        experts = tuple(tuple(sorted(some)) for some in self._hot_experts)
        return (*arithmetic(self._backend.device.torch_device), tuple(self._hot), experts, *places)

    def cache_bytes(self, count: int) -> int:
        """See :class:`powerinfer_tools.engine.hot.HotSide`."""
        return sum(positions.nbytes for positions in self._cached(0, count))

    def cache_block(self, first: int, count: int) -> bytes:
        """See :class:`powerinfer_tools.engine.hot.HotSide`."""
        cached = self._cached(first, count)
        if not cached:  # another thread may be computing
            return b""
        self._wait(len(self._queued))
        return b"".join(positions.cpu().numpy().tobytes() for positions in cached)

    def restore_cache(self, first: int, count: int, data: bytes) -> None:
        """See :class:`powerinfer_tools.engine.hot.HotSide`."""
        self._wait(len(self._queued))
        work = partial(fill, self._cached(first, count), data)
        self._backend.device.submit((("restore", work),)).wait()

    def time(self, *, on: bool) -> None:
        """See :class:`powerinfer_tools.engine.hot.HotSide`."""
        self._backend.device.timed = on

    def has_attention(self, layer: int) -> bool:
        """Whether the attention block of ``layer`` is here."""
        return self._there[layer]

    def hot_neurons(self, layer: int) -> int:
        """Neurons of ``layer`` that are computed here."""
        return self._hot[layer]

    def hot_experts(self, layer: int) -> frozenset[int]:
        """Experts of ``layer`` that are computed here."""
        return self._hot_experts[layer]

    def has_predictor(self, layer: int) -> bool:
        """Whether the predictor of ``layer`` is here."""
        return self._predictor(layer) is not None

    @property
    def left_out(self) -> int:
        """Hot neurons that were not named so far, over all tokens."""
        predicted = (self.predicted(layer) for layer in range(len(self._hot)))
        return sum(counts[0] for counts in predicted if counts is not None)

    def predicted(self, layer: int) -> tuple[int, int, int] | None:
        """See :class:`powerinfer_tools.engine.hot.HotSide`."""
        if self._counted is not None:
            return self._counted[layer]
        self._wait(len(self._queued))
        predictor = self._predictor(layer)
        if predictor is None:
            return None
        left_out, active, named = predictor.counts.cpu().tolist()
        return left_out, active, named

    def launch(
        self,
        layer: int,
        normed: Floats,
        acts: Activations | None,
        x: Floats,
        routes: Sequence[Route] = (),
    ) -> None:
        """Begin ``layer``; see :class:`powerinfer_tools.engine.hot.HotSide`."""
        assert self._running is None
        try:
            tickets = self._backend.launch(layer, normed, acts, x, routes)
        except DeviceLost as error:
            self._move(error)
            tickets = self._backend.launch(layer, normed, acts, x, routes)
        self._running = _Launched(layer, normed, acts, x, routes, tickets)

    def named(self, layer: int, out: Floats) -> None:
        """Wait for the predictor's answer for the cold neurons of the begun layer."""
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
        """The residual stream comes here; see :class:`powerinfer_tools.engine.hot.HotSide`."""
        # The host's buffers of the last pass may be overwritten from here on.
        self._wait(len(self._queued))
        self._queue(lambda stream: stream.enter(x, position))

    def begin(self, layer: int, tokens: int, position: int) -> None:
        """Begin a layer whose attention is here."""
        self._queue(lambda stream: stream.begin(layer, tokens, position))

    def ffn_input(self, layer: int, normed: Floats, shown: Floats) -> None:
        """Wait for the input of the begun layer's FFN."""
        self._wait_for_input()
        stream = self._backend.stream
        assert stream is not None
        rows, residual = stream.input(len(normed))
        normed[...] = rows
        begun = stream.layers[layer]
        if begun is not None and begun.shows_stream:
            shown[...] = residual

    def router_scores(self, layer: int, experts: Floats, shared: Floats) -> None:
        """Wait for the scores of the begun layer's router."""
        self._wait_for_input()
        stream = self._backend.stream
        assert stream is not None
        scores = stream.router(layer).host
        experts[...] = scores.experts[: len(experts)].numpy()
        shared[...] = scores.shared[: len(shared)].numpy()

    def experts(self, layer: int, routes: Sequence[Route], tokens: int) -> None:
        """Begin the hot experts of the begun layer."""
        self._queue(lambda stream: stream.experts(layer, routes, tokens))

    def merge(self, layer: int, cold: Floats | None, tokens: int) -> None:
        """The sum of the begun layer's FFN joins the stream."""
        self._queue(lambda stream: stream.merge(layer, cold, tokens))

    def leave(self, x: Floats) -> None:
        """Wait for the stream."""
        self._queue(lambda stream: stream.leave(len(x)))
        self._wait(len(self._queued))
        assert self._backend.stream is not None
        x[...] = self._backend.stream.input(len(x))[1]

    def logits(self, x: Floats | None, first: int, last: int) -> Floats:
        """See :class:`powerinfer_tools.engine.hot.HotSide`."""
        try:
            return self._logits(x, first, last)
        except DeviceLost as error:
            self._move(error)
            return self._logits(x, first, last)

    def close(self) -> None:
        """Free the device memory and end the queue; the counters can still be read."""
        try:
            self._counted = [self.predicted(layer) for layer in range(len(self._hot))]
        except (RuntimeError, DeviceLost):
            self._counted = [None] * len(self._hot)  # nothing can be read from a lost device
        self._backend.close()

    def _logits(self, x: Floats | None, first: int, last: int) -> Floats:
        tickets = self._backend.logits(x, first, last)
        self._queued += [Queued(ticket, _NO_LAYER, awaited=True) for ticket in tickets]
        self._wait(len(self._queued))
        assert self._backend.head is not None
        logits: Floats = self._backend.head.host[: last - first].numpy()
        return logits

    def _cached(self, first: int, count: int) -> list[torch.Tensor]:
        """Some positions of the KV caches that are here: views."""
        stream = self._backend.stream
        return [] if stream is None else [held[:, first : first + count] for held in stream.caches]

    def _predictor(self, layer: int) -> HotPredictor | None:
        """The predictor of ``layer``, if it is on the device."""
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
            again = self._launch_again(running)
            spans, running.tickets[:] = [ticket.wait() for ticket in again], []
        for timed in spans:
            self._count([running.layer] * len(timed), timed)
        self._waited(started, spans)

    def _launch_again(self, run: _Launched) -> list[Ticket]:
        return self._backend.launch(run.layer, run.normed, run.acts, run.x, run.routes)

    def _wait_for_input(self) -> None:
        """Wait for the FFN's input; the hot part is queued after it, and continues."""
        count, self._before_turn = self._before_turn, 0
        self._wait(count)

    def _queue(self, work: Callable[[HotStream], list[Queued]]) -> None:
        assert self._backend.stream is not None
        try:
            for queued in work(self._backend.stream):
                self._queued.append(queued)
                if queued.awaited:
                    self._before_turn = len(self._queued)
        except DeviceLost as error:
            self._move(error)

    def _wait(self, count: int) -> None:
        """Wait for the first ``count`` pieces of queued work."""
        started = time.perf_counter()
        waited, self._queued = self._queued[:count], self._queued[count:]
        try:
            # Work is done in order: when the last is done, there is nothing to wait for in the others.
            spans = [queued.ticket.wait() for queued in reversed(waited)]
        except DeviceLost as error:
            if self._backend.stream is None:
                raise
            self._move(error)
        for queued, timed in zip(waited, reversed(spans), strict=True):
            self._count(queued.layers, timed)
        self._waited(started, spans)

    def _waited(self, started: float, spans: Sequence[Sequence[Span]]) -> None:
        """Count the waiting time since ``started``, if it is known how long the device worked meanwhile."""
        if any(spans):
            self.waiting_seconds += time.perf_counter() - started

    def _count(self, layers: Sequence[int | None], spans: Sequence[Span]) -> None:
        self.seconds += sum(span.end - span.start for span in spans)
        self.spans += zip(layers, spans, strict=False)

    def _move(self, error: DeviceLost) -> None:
        whole = isinstance(error, MemoryEnded)
        what = "the GPU ran out of memory" if whole else "the GPU stopped working"
        if not whole:
            loss.keep(self._backend)
        if self._backend.stream is not None:
            raise DeviceLost(
                f"{what} ({error}), and the KV cache in its memory is lost; begin again, "
                "with --device none if the GPU does not come back"
            )
        if self._spare is None:
            raise error
        # The counters of a lost device are lost with it.
        lost, self._backend, self._spare = self._backend, self._spare(), None
        self._queued, self._before_turn = [], 0
        self.notices.append(f"{what} ({error}); torch computes its part on the CPU from here on")
        self._lost = lost  # its tensors cannot be freed without the device
