"""Layers whose attention is on the device: the residual stream stays there as long as such layers follow.

A layer with cold neurons costs two copies: the FFN's normalised input to the host, and the cold side's sum
back. Everything is queued in order, so the host waits for that input alone, and for the stream when it
leaves. Of a layer with experts, the host waits for what the router says, too, and queues the hot experts that
tokens take; where they take no others, nothing comes back.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from powerinfer_tools.engine.hot.devices import Device, Steps, Ticket
from powerinfer_tools.engine.hot.experts import Dispatch, HotExperts, HotRouter
from powerinfer_tools.engine.hot.hot_blocks import HotBlocks
from powerinfer_tools.engine.hot.hot_ffn import HotFFN, Inputs, Joining, Scratch
from powerinfer_tools.engine.hot.prediction import HotPredictor, Naming
from powerinfer_tools.engine.hot.routes import Route

Floats = npt.NDArray[np.float32]
Tensor = torch.Tensor


@dataclass(frozen=True)
class Landing:
    """Where copies leave from and arrive in memory of the host, float32 (T, width)."""

    stream: Tensor
    normed: Tensor
    cold: Tensor


@dataclass(frozen=True)
class StreamMemory:
    """On the device, float32 (T, width): the residual stream, the FFN's input (exact and as the integer
    kernels round it), the sums of the hot and of the cold side; ``positions`` int64 (T,) of the tokens;
    scratch; and the host's ends of copies."""

    x: Tensor
    normed: Inputs
    hot: Tensor
    cold: Tensor
    positions: Tensor
    ffn: Scratch
    host: Landing
    naming: Naming
    dispatch: Dispatch | None


@dataclass(frozen=True)
class HotLayer:
    """A layer whose attention is on the device, with its ``blocks``. ``ffn``: its hot neurons; None where
    the whole FFN is the host's, whose norm and merge are then the host's, too. ``predictor``: names the
    neurons of both sides. ``cold``: the host computes other neurons; ``shows_stream``: and reads the stream,
    besides its norm. With experts, ``ffn`` are the hot ones, if only none, and ``router`` speaks of all of
    them."""

    blocks: HotBlocks
    ffn: HotFFN | HotExperts | None
    predictor: HotPredictor | None
    router: HotRouter | None
    cold: bool
    shows_stream: bool


class HotStream:
    """Queues the work of such layers; ``parallel``: FFN and attention read the same stream."""

    def __init__(
        self, device: Device, layers: Sequence[HotLayer | None], memory: StreamMemory, *, parallel: bool
    ) -> None:
        self._device, self.layers, self._memory, self._parallel = device, layers, memory, parallel
        self._decode = [None if layer is None else self._recorded(layer) for layer in layers]
        self._some_hot = False  # whether the begun layer has a sum of hot neurons or experts

    @property
    def caches(self) -> list[Tensor]:
        """What the KV caches of all layers hold, (kv_heads, context, …) each."""
        placed = next(layer.blocks.placed for layer in self.layers if layer is not None)
        return placed.caches()

    def enter(self, x: Floats, position: int) -> Ticket:
        """The stream comes from the host, its first row standing at ``position``."""
        tokens, host = len(x), self._memory.host.stream
        host[:tokens].numpy()[...] = x
        steps: Steps = (("copy in", partial(self._copy_in, tokens, position)),)
        return self._device.submit(steps)

    def begin(self, index: int, tokens: int, position: int) -> list[Ticket]:
        """Attention of layer ``index``, then its FFN's input and hot part; the first ticket is the input's.
        Where the FFN is the host's, attention alone."""
        layer = self.layers[index]
        assert layer is not None
        self._some_hot = isinstance(layer.ffn, HotFFN)
        decode = self._decode[index] if tokens == 1 else None
        if decode is not None and decode.pieces:
            return [self._device.submit(steps) for steps in decode.pieces]
        parts = decode.parts if decode is not None else self._parts(layer, tokens)
        return [self._device.submit(steps) for steps in parts.pieces(position, parallel=self._parallel)]

    def input(self, tokens: int) -> tuple[Floats, Floats]:
        """The FFN's input that was waited for, and the stream where the layer shows it: views."""
        normed: Floats = self._memory.host.normed[:tokens].numpy()
        stream: Floats = self._memory.host.stream[:tokens].numpy()
        return normed, stream

    def prepare(self, tokens: int) -> None:
        """Take now what batches of ``tokens`` take."""
        for layer in self.layers:
            if layer is not None:
                parts = self._parts(layer, tokens)
                work = [*parts.pieces(0, parallel=self._parallel), *parts.merges]
                if isinstance(layer.ffn, HotExperts) and layer.ffn.experts:
                    work.append(self._expert_steps(layer.ffn, layer.ffn.busiest(tokens), tokens))
                for steps in work:
                    self._device.prepare(steps)

    def router(self, index: int) -> HotRouter:
        """What speaks of the experts of layer ``index``."""
        layer = self.layers[index]
        assert layer is not None
        assert layer.router is not None
        return layer.router

    def experts(self, index: int, routes: Sequence[Route], tokens: int) -> Ticket:
        """The hot experts of the begun layer, whose router was waited for."""
        layer = self.layers[index]
        assert layer is not None
        assert isinstance(layer.ffn, HotExperts)
        self._some_hot = True
        decode, dispatch = self._decode[index] if tokens == 1 else None, self._memory.dispatch
        if decode is not None and decode.experts and dispatch is not None:
            dispatch.stage_one(layer.ffn, routes)
            return self._device.submit(decode.experts)
        return self._device.submit(self._expert_steps(layer.ffn, routes, tokens))

    def merge(self, index: int, cold: Floats | None, tokens: int) -> list[Ticket]:
        """The FFN's sum joins the stream; ``cold`` (tokens, width) is the host's part of it. Nothing is
        left to do where :meth:`begin` has done it already."""
        layer = self.layers[index]
        assert layer is not None
        if cold is not None:
            self._memory.host.cold[:tokens].numpy()[...] = cold
        decode = self._decode[index] if tokens == 1 else None
        parts = decode.parts if decode is not None else self._parts(layer, tokens)
        steps = parts.merge(hot=self._some_hot, cold=cold is not None)
        return [self._device.submit(steps)] if steps else []

    def leave(self, tokens: int) -> Ticket:
        """The stream goes to the host, to be read with :meth:`input`."""
        return self._device.submit((("copy out", partial(self._copy_stream_out, tokens)),))

    def rows(self, first: int, last: int) -> Tensor:
        """Rows of the stream on the device."""
        return self._memory.x[first:last]

    def _recorded(self, layer: HotLayer) -> "_Decode":
        """All that one token takes. Where attention knows on the device how far to look, nothing of it has to
        be queued step by step."""
        parts = self._parts(layer, 1)
        if parts.attend is not None:
            each = {name: self._record(steps) for name, steps in parts.steps.items()}
            return _Decode(_Parts(attend=parts.attend, **each), (), self._experts_once(layer))
        pieces = parts.pieces(0, parallel=self._parallel)
        if not layer.cold and layer.router is None:
            # Nothing comes from the host in between.
            whole: Steps = tuple(step for steps in (*pieces, parts.merge_hot) for step in steps)
            pieces, parts = [whole], replace(parts, merge_hot=())
        merges = {name: self._record(steps) for name, steps in parts.steps.items() if "merge" in name}
        whole_pieces = [self._record(steps) for steps in pieces]
        return _Decode(_Parts(attend=None, **parts.steps | merges), whole_pieces, self._experts_once(layer))

    def _experts_once(self, layer: HotLayer) -> Steps:
        """What is the same for the hot experts of every single token; nothing where it is not."""
        m, experts = self._memory, layer.ffn
        if not isinstance(experts, HotExperts) or experts.stack is None or m.dispatch is None:
            return ()
        return self._record(m.dispatch.steps_of_one(experts, m.normed.first(1), m.hot[:1]))

    def _record(self, steps: Steps) -> Steps:
        return self._device.recorded(steps) if steps else ()

    def _parts(self, layer: HotLayer, tokens: int) -> "_Parts":
        m = self._memory
        mixed = layer.blocks.mix(m.x[:tokens])
        before: Steps = (("attention", mixed.before),)
        after: Steps = (("attention", mixed.after),) if mixed.attend else ()
        if layer.ffn is None:
            return _Parts(before, mixed.attend, after, (), (), (), (), ())
        normed = m.normed.first(tokens)
        return _Parts(
            before=before,
            attend=mixed.attend,
            after=after,
            input=self._input_steps(layer, tokens, normed),
            hot=self._hot_steps(layer, tokens, normed),
            merge_both=self._merge_steps(layer, tokens, hot=True, cold=True),
            merge_hot=self._merge_steps(layer, tokens, hot=True, cold=False),
            merge_cold=self._merge_steps(layer, tokens, hot=False, cold=True),
        )

    def _expert_steps(self, experts: HotExperts, routes: Sequence[Route], tokens: int) -> Steps:
        m = self._memory
        assert m.dispatch is not None
        return m.dispatch.steps(experts, routes, m.normed.first(tokens), m.hot[:tokens])

    def _input_steps(self, layer: HotLayer, tokens: int, normed: Inputs) -> Steps:
        """The FFN's input, and what is made of it before any neuron or expert can be computed."""
        m = self._memory
        steps: Steps = (("hot", layer.blocks.ffn_input(m.x[:tokens])),)
        if layer.predictor is not None:
            named = m.naming.steps(layer.predictor, normed, m.x[:tokens], cold=layer.cold)
            steps = (*steps, *named)
        if layer.router is not None:
            copy = partial(layer.router.copy_out, tokens)
            steps = (*steps, ("router", partial(layer.router.compute, normed)), ("copy out", copy))
        if layer.cold:
            steps = (*steps, ("copy out", partial(self._copy_input_out, layer, tokens)))
        return steps

    def _hot_steps(self, layer: HotLayer, tokens: int, normed: Inputs) -> Steps:
        """The hot neurons; which experts there are to compute is not known yet."""
        if not isinstance(layer.ffn, HotFFN):
            return ()
        m, named = self._memory, None
        if layer.predictor is not None:
            named = m.naming.of_hot(layer.predictor, tokens)
        joins = self._joins(layer, tokens)
        out = (m.hot if joins is None else m.x)[:tokens]
        steps: Steps = (("hot", partial(layer.ffn.compute, normed, m.ffn, out, named, joins)),)
        if layer.predictor is not None and layer.predictor.checks and named is not None:
            count = partial(layer.ffn.count, normed, m.ffn, named, layer.predictor.counts)
            steps = (("recall", count), *steps)
        return steps

    def _joins(self, layer: HotLayer, tokens: int) -> Joining | None:
        """How a single token's hot sum joins the stream, where fused kernels add it at once."""
        whole = isinstance(layer.ffn, HotFFN) and layer.ffn.fused and not layer.cold
        return layer.blocks.joins if whole and tokens == 1 else None

    def _merge_steps(self, layer: HotLayer, tokens: int, *, hot: bool, cold: bool) -> Steps:
        """The sums of the sides that computed something join the stream; nothing where that cannot be."""
        experts = layer.ffn if isinstance(layer.ffn, HotExperts) else None
        possible = (
            (hot and cold == layer.cold)
            if experts is None
            else ((not hot or bool(experts.experts)) and (not cold or layer.cold))
        )
        if not possible or self._joins(layer, tokens) is not None:
            return ()
        back: Steps = (("copy in", partial(self._copy_cold_in, tokens)),) if cold else ()
        m = self._memory
        sums = [part[:tokens] for part, there in ((m.hot, hot), (m.cold, cold)) if there]
        return (*back, ("merge", layer.blocks.merge(m.x[:tokens], sums)))

    def _copy_in(self, tokens: int, position: int) -> None:
        m = self._memory
        m.x[:tokens].copy_(m.host.stream[:tokens], non_blocking=True)
        torch.arange(position, position + tokens, out=m.positions[:tokens])

    def _copy_input_out(self, layer: HotLayer, tokens: int) -> None:
        m = self._memory
        m.host.normed[:tokens].copy_(m.normed.exact[:tokens], non_blocking=True)
        if layer.shows_stream:
            self._copy_stream_out(tokens)

    def _copy_stream_out(self, tokens: int) -> None:
        m = self._memory
        m.host.stream[:tokens].copy_(m.x[:tokens], non_blocking=True)

    def _copy_cold_in(self, tokens: int) -> None:
        m = self._memory
        m.cold[:tokens].copy_(m.host.cold[:tokens], non_blocking=True)


@dataclass(frozen=True)
class _Parts:
    """The steps of one layer: what comes before and after attention proper, which the host tells where the
    first token stands (None: it is among what comes before), the FFN's input, its hot part, and the merge of
    both sides, or of one."""

    before: Steps
    attend: Callable[[int], None] | None
    after: Steps
    input: Steps
    hot: Steps
    merge_both: Steps
    merge_hot: Steps
    merge_cold: Steps

    @property
    def steps(self) -> dict[str, Steps]:
        """All of them by name, empty ones too."""
        return {name: steps for name, steps in vars(self).items() if name != "attend"}

    @property
    def merges(self) -> list[Steps]:
        """All that there are."""
        return [steps for steps in (self.merge_both, self.merge_hot, self.merge_cold) if steps]

    def merge(self, *, hot: bool, cold: bool) -> Steps:
        """That of the sides that computed something."""
        if hot and cold:
            return self.merge_both
        return self.merge_hot if hot else self.merge_cold

    def pieces(self, position: int, *, parallel: bool) -> list[Steps]:
        """What begins the layer, the FFN's input at the end of the first piece, if the FFN is here; the first
        token stands at ``position``."""
        attention = self.before
        if self.attend is not None:
            attention = (*attention, ("attention", partial(self.attend, position)), *self.after)
        if parallel and self.input:
            return [self.input, (*attention, *self.hot)]
        return [(*attention, *self.input), *([self.hot] if self.hot else [])]


@dataclass(frozen=True)
class _Decode:
    """Of one layer and one token: its parts, recorded where each step is; ``pieces`` that begin it, where
    they are recorded as wholes; ``experts``: the hot ones, whichever the token takes."""

    parts: _Parts
    pieces: Sequence[Steps]
    experts: Steps
