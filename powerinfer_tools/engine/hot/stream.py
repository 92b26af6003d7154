"""Layers whose attention is on the device: the residual stream stays there as long as such layers follow.

In a layer with cold neurons, the FFN's normalised input goes to the host, and the cold side's sum comes back.
Everything is queued in order, so the host waits only for that input, and for the stream when it leaves. In a
layer with experts, the host also waits for the router's scores, and queues the hot experts that tokens take;
if they take no other experts, nothing comes back. The work of a single token is queued ahead, up to the
host's next turn: see :mod:`powerinfer_tools.engine.hot.stretches`.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from powerinfer_tools.engine.hot.devices import Device, Steps
from powerinfer_tools.engine.hot.experts import HotExperts, HotRouter, WholeFFN
from powerinfer_tools.engine.hot.head import HotHead
from powerinfer_tools.engine.hot.hot_ffn import HotFFN
from powerinfer_tools.engine.hot.layer_steps import HotLayer, LayerSteps, StreamMemory
from powerinfer_tools.engine.hot.routes import Route
from powerinfer_tools.engine.hot.stretches import Queued, Stretch, TokenPlan

Floats = npt.NDArray[np.float32]
Tensor = torch.Tensor


class HotStream:
    """Queues the work of such layers, and of the ``head`` behind them; ``parallel``: FFN and attention read
    the same stream."""

    def __init__(
        self,
        device: Device,
        layers: Sequence[HotLayer | None],
        memory: StreamMemory,
        head: HotHead | None,
        *,
        parallel: bool,
    ) -> None:
        self._device, self.layers, self._memory, self._parallel = device, layers, memory, parallel
        self._steps = LayerSteps(memory)
        ending = None if head is None else head.steps(memory.x[:1])
        self._plan = TokenPlan(device, layers, self._steps, ending, parallel=parallel)
        self._some_hot = False  # whether the begun layer has a sum of hot neurons or experts
        self._position, self._alone, self._comes = 0, False, False

    @property
    def caches(self) -> list[Tensor]:
        """The contents of the KV caches of all layers, (kv_heads, context, …) each."""
        placed = next(layer.blocks.placed for layer in self.layers if layer is not None)
        return placed.caches()

    @property
    def to_the_end(self) -> bool:
        """Whether the stream is still on the device after the last layer."""
        last = self.layers[-1]
        return last is not None and last.ffn is not None

    @property
    def ended(self) -> bool:
        """Whether the head of this pass is queued already, where there is one."""
        return self._alone

    def enter(self, x: Floats, position: int) -> list[Queued]:
        """The stream comes from the host, its first row standing at ``position``."""
        tokens, host = len(x), self._memory.host
        host.stream[:tokens].numpy()[...] = x
        host.positions[:tokens].numpy()[...] = range(position, position + tokens)
        self._position, self._alone, self._comes = position, tokens == 1, True
        return [] if self._alone else [self._submit(None, self._steps.enter(tokens))]

    def begin(self, index: int, tokens: int, position: int) -> list[Queued]:
        """Attention of layer ``index``, then its FFN's input and hot part; where the FFN is the host's,
        attention alone."""
        layer = self._layer(index)
        self._some_hot = isinstance(layer.ffn, HotFFN | WholeFFN)
        comes, self._comes = self._comes, False
        if self._alone:
            return self._stretches(self._plan.opening[index]) if comes else []
        pieces = self._steps.parts(layer, tokens).pieces(position, parallel=self._parallel)
        waits = layer.ffn is None or layer.cold or layer.router is not None
        return [
            self._submit(index, steps, awaited=waits and not number) for number, steps in enumerate(pieces)
        ]

    def input(self, tokens: int) -> tuple[Floats, Floats]:
        """The FFN's input that was waited for, and the stream where the layer shows it: views."""
        normed: Floats = self._memory.host.normed[:tokens].numpy()
        stream: Floats = self._memory.host.stream[:tokens].numpy()
        return normed, stream

    def prepare(self, tokens: int) -> None:
        """Allocate now the memory that batches of ``tokens`` need."""
        for layer in self.layers:
            if layer is not None:
                parts = self._steps.parts(layer, tokens)
                work = [*parts.pieces(0, parallel=self._parallel), *parts.merges]
                if isinstance(layer.ffn, HotExperts) and layer.ffn.experts:
                    work.append(self._steps.experts(layer.ffn, layer.ffn.busiest(tokens), tokens))
                for steps in work:
                    self._device.prepare(steps)

    def router(self, index: int) -> HotRouter:
        """The router of layer ``index``."""
        router = self._layer(index).router
        assert router is not None
        return router

    def experts(self, index: int, routes: Sequence[Route], tokens: int) -> list[Queued]:
        """The hot experts of the begun layer, whose router was waited for."""
        experts = self._layer(index).ffn
        assert isinstance(experts, HotExperts)
        self._some_hot = True
        if self._alone and index in self._plan.experts:
            assert self._memory.dispatch is not None
            self._memory.dispatch.stage_one(experts, routes)
            return self._stretches(self._plan.experts[index])
        return [self._submit(index, self._steps.experts(experts, routes, tokens))]

    def merge(self, index: int, cold: Floats | None, tokens: int) -> list[Queued]:
        """The FFN's sum joins the stream; ``cold`` (tokens, width) is the host's part of it. Nothing is
        left to do where that was queued with the layer."""
        if cold is not None:
            self._memory.host.cold[:tokens].numpy()[...] = cold
        hot = self._some_hot
        if self._alone:
            return self._stretches(self._plan.closing.get((index, hot, cold is not None), ()))
        parts = self._steps.parts(self._layer(index), tokens)
        steps = parts.merge(hot=hot, cold=cold is not None)
        return [self._submit(index, steps)] if steps else []

    def leave(self, tokens: int) -> list[Queued]:
        """The stream goes to the host, to be read with :meth:`input`."""
        return [] if self._alone else [self._submit(None, self._steps.leave(tokens), awaited=True)]

    def rows(self, first: int, last: int) -> Tensor:
        """Rows of the stream on the device."""
        return self._memory.x[first:last]

    def _layer(self, index: int) -> HotLayer:
        layer = self.layers[index]
        assert layer is not None
        return layer

    def _stretches(self, stretches: Sequence[Stretch]) -> list[Queued]:
        return [stretch.submit(self._position) for stretch in stretches]

    def _submit(self, layer: int | None, steps: Steps, *, awaited: bool = False) -> Queued:
        ticket = self._device.submit(steps, awaited=awaited)
        return Queued(ticket, [layer] * len(steps), awaited)
