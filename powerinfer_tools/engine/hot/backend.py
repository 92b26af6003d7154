"""Everything that is on one device, and the code that queues its work.

A layer whose attention is the host's is three steps in the device's queue (copy in, compute, copy out) and
one wait; nothing else synchronises. Layers whose attention is on the device are
:mod:`powerinfer_tools.engine.hot.stream`'s.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from powerinfer_kernels import Activations
from powerinfer_tools.engine.hot.devices import Device, Steps, Ticket
from powerinfer_tools.engine.hot.experts import Dispatch, HotExperts, WholeFFN
from powerinfer_tools.engine.hot.head import HotHead
from powerinfer_tools.engine.hot.hot_ffn import HotFFN, Inputs, Scratch
from powerinfer_tools.engine.hot.mapped import copy, through
from powerinfer_tools.engine.hot.prediction import HotPredictor, Naming
from powerinfer_tools.engine.hot.routes import Route
from powerinfer_tools.engine.hot.stream import HotStream

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Exchange:
    """The buffers that the two sides exchange, float32 (T, width): inputs and output, on the host and on the
    device. ``window_in`` and ``window_out``: the host's buffers as tensors that kernels can access, if
    possible."""

    host_in: Inputs
    host_out: torch.Tensor
    device_in: Inputs
    device_out: torch.Tensor
    window_in: Inputs | None = None
    window_out: torch.Tensor | None = None

    def stage(self, normed: Floats, acts: Activations | None) -> None:
        """Put the inputs into the buffers that the device copies from."""
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
        windows, target = self.window_in if tokens == 1 else None, self.device_in.first(tokens)
        here, crossing = (windows or self.host_in).first(tokens), copy if windows is None else through
        crossing(here.rounded, target.rounded)
        if self.device_in.exact is not self.device_in.rounded:
            crossing(here.exact, target.exact)

    def out(self, hot: HotFFN | WholeFFN | HotExperts, tokens: int) -> torch.Tensor:
        """The buffer for the sum of ``hot``: the host's own, if ``hot`` writes each value once."""
        direct = self.window_out is not None and tokens == 1 and isinstance(hot, HotFFN) and hot.fused
        target = self.window_out if direct and self.window_out is not None else self.device_out
        return target[:tokens]

    def deliver(self, out: torch.Tensor) -> Steps:
        """The steps that copy ``out`` to the host; none if it is there already."""
        if out.data_ptr() == self.host_out.data_ptr():
            return ()
        if self.window_out is not None and len(out) == 1:
            return (("copy out", partial(through, out, self.window_out[:1])),)
        return (("copy out", partial(copy, out, self.host_out[: len(out)])),)


@dataclass(frozen=True)
class FFNsApart:
    """The hot neurons, or experts, of layers whose attention is the host's (None: a layer has none, or is the
    stream's).

    ``rounded``: some rows take the input as the integer kernels round it. ``predictors`` of such layers,
    where they are on the device; ``stream``, the host's and the device's end (T, width) of what some of them
    read beside the input, is empty where none does. ``naming`` is also the stream's, and so is ``dispatch``,
    None where no expert is hot.
    """

    layers: Sequence[HotFFN | WholeFFN | HotExperts | None]
    exchange: Exchange
    scratch: Scratch
    rounded: bool
    predictors: Sequence[HotPredictor | None]
    naming: Naming
    stream: tuple[torch.Tensor, torch.Tensor]
    dispatch: Dispatch | None


class Backend:
    """All that is on one device; ``stream`` and ``head`` are None where they are the host's."""

    def __init__(
        self, device: Device, ffns: FFNsApart, stream: HotStream | None, head: HotHead | None
    ) -> None:
        self.device, self.stream, self.head = device, stream, head
        self.layers, self._exchange, self._scratch = ffns.layers, ffns.exchange, ffns.scratch
        self._rounded, self._stream, self._dispatch = ffns.rounded, ffns.stream, ffns.dispatch
        self.predictors, self.naming = ffns.predictors, ffns.naming
        self._decode = [[device.recorded(steps) for steps in self._once(i)] for i in range(len(self.layers))]
        self._head_decode: Steps = ()
        if head is not None and (stream is None or not stream.to_the_end):
            self._head_decode = device.recorded(head.arriving(1))

    def prepare(self, tokens: int) -> None:
        """Allocate now the memory that batches of ``tokens`` need, and begin counting."""
        for index, layer in enumerate(self.layers):
            routes = layer.busiest(tokens) if isinstance(layer, HotExperts) else ()
            for steps in self._steps(index, tokens, routes) if layer else ():
                self.device.prepare(steps)
        predictors = [predictor for predictor in self.predictors if predictor is not None]
        if self.stream is not None:
            self.stream.prepare(tokens)
            predictors += [layer.predictor for layer in self.stream.layers if layer and layer.predictor]
        if self.head is not None:
            self.device.prepare(self.head.arriving(len(self.head.logits)))
        for predictor in predictors:
            # The runs so far, with arbitrary input, have been counted.
            self.device.prepare((("reset", predictor.forget),))

    def launch(
        self, layer: int, normed: Floats, acts: Activations | None, x: Floats, routes: Sequence[Route]
    ) -> list[Ticket]:
        """Queue one layer. The last ticket belongs to its sum; a ticket before it, if any, belongs to the
        naming of neurons."""
        self._exchange.stage(normed, acts if self._rounded else None)
        tokens = len(normed)
        if self._reads_stream(layer):
            self._stream[0][:tokens].numpy()[...] = x
        recorded, hot = self._decode[layer] if tokens == 1 else [], self.layers[layer]
        if recorded and isinstance(hot, HotExperts) and self._dispatch is not None:
            self._dispatch.stage_one(hot, routes)
        pieces = recorded or self._steps(layer, tokens, routes)
        return [self.device.submit(steps) for steps in pieces]

    def output(self, tokens: int) -> Floats:
        """The sum of the layer that was waited for, a view."""
        result: Floats = self._exchange.host_out[:tokens].numpy()
        return result

    def logits(self, x: Floats | None, first: int, last: int) -> list[Ticket]:
        """Queue the head for rows of the stream: ``x`` (last - first, width), or, if ``x`` is None, rows
        ``first`` to ``last`` of the device's own stream. For a single token, that is queued already."""
        assert self.head is not None
        if x is None:
            assert self.stream is not None
            if self.stream.ended:
                return []
            return [self.device.submit(self.head.steps(self.stream.rows(first, last)))]
        self.head.landing[: len(x)].numpy()[...] = x
        recorded = self._head_decode if len(x) == 1 else ()
        return [self.device.submit(recorded or self.head.arriving(len(x)))]

    def close(self) -> None:
        """Forget all tensors, then close the device."""
        self.layers, self._decode, self.predictors = (), [], ()
        self._head_decode = ()
        self.stream = self.head = None
        del self._exchange, self._scratch, self._stream, self.naming, self._dispatch
        self.device.close()

    def _reads_stream(self, layer: int) -> bool:
        predictor = self.predictors[layer]
        return predictor is not None and predictor.scorer.residual

    def _once(self, layer: int) -> list[Steps]:
        """The steps that are the same for every single token; none if they depend on the token's experts."""
        hot, exchange = self.layers[layer], self._exchange
        if isinstance(hot, HotFFN | WholeFFN):
            return self._steps(layer, 1)
        if hot is None or hot.stack is None or self._dispatch is None:
            return []
        work = self._dispatch.steps_of_one(hot, exchange.device_in.first(1), exchange.device_out[:1])
        first: Steps = (("copy in", partial(exchange.copy_in, 1)),)
        return [(*first, *work, *exchange.deliver(exchange.device_out[:1]))]

    def _steps(self, layer: int, tokens: int, routes: Sequence[Route] = ()) -> list[Steps]:
        """One piece of work, or two if the device predicts."""
        hot, exchange = self.layers[layer], self._exchange
        assert hot is not None
        inputs, out = exchange.device_in.first(tokens), exchange.out(hot, tokens)
        first: Steps = (("copy in", partial(exchange.copy_in, tokens)),)
        last = exchange.deliver(out)
        if isinstance(hot, HotExperts):
            assert self._dispatch is not None
            return [(*first, *self._dispatch.steps(hot, routes, inputs, out), *last)]
        predictor, named = self.predictors[layer], None
        if predictor is not None:
            assert isinstance(hot, HotFFN)
            x = inputs.exact
            if predictor.scorer.residual:
                here, x = (end[:tokens] for end in self._stream)
                first = (*first, ("copy in", partial(copy, here, x)))
            cold = hot.neurons < len(predictor.threshold)
            first = (*first, *self.naming.steps(predictor, inputs, x, cold=cold))
            named = self.naming.of_hot(predictor, tokens)
        rest: Steps = (("hot", partial(hot.compute, inputs, self._scratch, out, named)), *last)
        if predictor is None or named is None:
            return [(*first, *rest)]
        if predictor.checks:
            assert isinstance(hot, HotFFN)
            rest = (("recall", partial(hot.count, inputs, self._scratch, named, predictor.counts)), *rest)
        return [first, rest]
