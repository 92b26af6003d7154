"""The steps of layers whose attention is on the device, for batches of any size, and the exchange between
both sides: by copies, or for a single token by kernels that access the host's memory themselves."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from powerinfer_tools.engine.hot.devices import Steps
from powerinfer_tools.engine.hot.experts import Dispatch, HotExperts, HotRouter, WholeFFN
from powerinfer_tools.engine.hot.hot_blocks import HotBlocks
from powerinfer_tools.engine.hot.hot_ffn import HotFFN, Inputs, Joining, Scratch
from powerinfer_tools.engine.hot.mapped import copy, through
from powerinfer_tools.engine.hot.prediction import HotPredictor, Naming
from powerinfer_tools.engine.hot.routes import Route
from powerinfer_tools.engine.hot.work import Work

Tensor = torch.Tensor


@dataclass(frozen=True)
class Landing:
    """The buffers that both sides exchange, float32 (T, width): the residual stream, the FFN's input, the
    cold side's sum; and ``positions`` int64 (T,). They are in the host's memory, or are views of it from the
    device."""

    stream: Tensor
    normed: Tensor
    cold: Tensor
    positions: Tensor


@dataclass(frozen=True)
class StreamMemory:
    """On the device, float32 (T, width): the residual stream, the FFN's input (exact and as the integer
    kernels round it), the sums of the hot and of the cold side; ``positions`` int64 (T,) of the tokens;
    scratch. ``host``: the host's ends; ``windows``: the same, which kernels reach, if they do.
    ``only_rounded``: nothing here reads the exact input."""

    x: Tensor
    normed: Inputs
    hot: Tensor
    cold: Tensor
    positions: Tensor
    ffn: Scratch
    host: Landing
    windows: Landing | None
    only_rounded: bool
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
    ffn: HotFFN | WholeFFN | HotExperts | None
    predictor: HotPredictor | None
    router: HotRouter | None
    cold: bool
    shows_stream: bool

    @property
    def whole(self) -> bool:
        """Whether the host sends nothing before the next layer."""
        return self.ffn is not None and not self.cold and self.router is None


@dataclass(frozen=True)
class LayerParts:
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

    def merge(self, *, hot: bool, cold: bool) -> Steps:
        """The merge of the sides that computed something."""
        if hot and cold:
            return self.merge_both
        return self.merge_hot if hot else self.merge_cold

    @property
    def merges(self) -> list[Steps]:
        """All merges."""
        return [steps for steps in (self.merge_both, self.merge_hot, self.merge_cold) if steps]

    def attention(self, position: int) -> Steps:
        """The attention of tokens, the first of which is at ``position``."""
        if self.attend is None:
            return self.before
        return (*self.before, ("attention", partial(self.attend, position)), *self.after)

    def pieces(self, position: int, *, parallel: bool) -> list[Steps]:
        """What begins the layer, the FFN's input at the end of the first piece, if the FFN is here; the first
        token stands at ``position``. With ``parallel``, attention and FFN read the same stream."""
        if parallel and self.input:
            return [self.input, (*self.attention(position), *self.hot)]
        return [(*self.attention(position), *self.input), *([self.hot] if self.hot else [])]


class LayerSteps:
    """Writes the steps of layers over ``memory``."""

    def __init__(self, memory: StreamMemory) -> None:
        self._memory = memory

    def enter(self, tokens: int) -> Steps:
        """The stream and the tokens' positions come from the host."""
        ends = (("stream", self._memory.x), ("positions", self._memory.positions))
        return (("copy in", partial(_all, [self._crossing(tokens, *end, out=False) for end in ends])),)

    def leave(self, tokens: int) -> Steps:
        """The stream goes to the host."""
        return (("copy out", self._crossing(tokens, "stream", self._memory.x, out=True)),)

    def parts(self, layer: HotLayer, tokens: int) -> LayerParts:
        """All of a layer."""
        m = self._memory
        mixed = layer.blocks.mix(m.x[:tokens])
        before: Steps = (("attention", mixed.before),)
        after: Steps = (("attention", mixed.after),) if mixed.attend else ()
        if layer.ffn is None:
            return LayerParts(before, mixed.attend, after, (), (), (), (), ())
        normed = m.normed.first(tokens)
        return LayerParts(
            before=before,
            attend=mixed.attend,
            after=after,
            input=self._input(layer, tokens, normed),
            hot=self._hot(layer, tokens, normed),
            merge_both=self._merge(layer, tokens, hot=True, cold=True),
            merge_hot=self._merge(layer, tokens, hot=True, cold=False),
            merge_cold=self._merge(layer, tokens, hot=False, cold=True),
        )

    def experts(self, experts: HotExperts, routes: Sequence[Route], tokens: int) -> Steps:
        """The steps of the hot experts that tokens take."""
        m = self._memory
        assert m.dispatch is not None
        return m.dispatch.steps(experts, routes, m.normed.first(tokens), m.hot[:tokens])

    def experts_of_one(self, layer: HotLayer) -> Steps:
        """The steps of hot experts that are the same for every single token; none if they differ."""
        m, experts = self._memory, layer.ffn
        if not isinstance(experts, HotExperts) or experts.stack is None or m.dispatch is None:
            return ()
        return m.dispatch.steps_of_one(experts, m.normed.first(1), m.hot[:1])

    def _input(self, layer: HotLayer, tokens: int, normed: Inputs) -> Steps:
        """The FFN's input, and the steps on it before any neuron or expert can be computed."""
        m, windows = self._memory, self._windows(tokens)
        # The norm's kernel writes to the host directly if nothing on the device reads its exact output.
        tells = layer.cold and windows is not None and m.only_rounded and layer.blocks.norms_input
        shown = windows.normed[:tokens] if tells and windows is not None else None
        steps: Steps = (("hot", layer.blocks.ffn_input(m.x[:tokens], shown)),)
        if layer.predictor is not None:
            named = m.naming.steps(layer.predictor, normed, m.x[:tokens], cold=layer.cold)
            steps = (*steps, *named)
        if layer.router is not None:
            tells_scores = layer.router.tell(tokens)
            steps = (*steps, ("router", partial(layer.router.compute, normed)), ("copy out", tells_scores))
        if layer.cold and shown is None:
            steps = (*steps, ("copy out", self._crossing(tokens, "normed", m.normed.exact, out=True)))
        return (*steps, *self.leave(tokens)) if layer.cold and layer.shows_stream else steps

    def _hot(self, layer: HotLayer, tokens: int, normed: Inputs) -> Steps:
        """The hot neurons; the experts to compute are not known yet."""
        if not isinstance(layer.ffn, HotFFN | WholeFFN):
            return ()
        m, named = self._memory, None
        if layer.predictor is not None:
            named = m.naming.of_hot(layer.predictor, tokens)
        joins = self._joins(layer, tokens)
        out = (m.hot if joins is None else m.x)[:tokens]
        steps: Steps = (("hot", partial(layer.ffn.compute, normed, m.ffn, out, named, joins)),)
        if layer.predictor is not None and layer.predictor.checks and named is not None:
            assert isinstance(layer.ffn, HotFFN)
            count = partial(layer.ffn.count, normed, m.ffn, named, layer.predictor.counts)
            steps = (("recall", count), *steps)
        return steps

    def _joins(self, layer: HotLayer, tokens: int) -> Joining | None:
        """How a single token's hot sum joins the stream, where fused kernels add it at once."""
        whole = isinstance(layer.ffn, HotFFN) and layer.ffn.fused and not layer.cold
        return layer.blocks.joins if whole and tokens == 1 else None

    def _merge(self, layer: HotLayer, tokens: int, *, hot: bool, cold: bool) -> Steps:
        """Add the sums of the sides that computed something to the stream; no steps if that cannot happen."""
        experts = layer.ffn if isinstance(layer.ffn, HotExperts) else None
        possible = (
            (hot and cold == layer.cold)
            if experts is None
            else ((not hot or bool(experts.experts)) and (not cold or layer.cold))
        )
        if not possible or self._joins(layer, tokens) is not None:
            return ()
        m, windows = self._memory, self._windows(tokens)
        back: Steps = ()
        arrived = m.cold
        if cold and hot and windows is not None:
            arrived = windows.cold  # read once, by the kernel that adds it
        elif cold:
            back = (("copy in", self._crossing(tokens, "cold", m.cold, out=False)),)
        sums = [part[:tokens] for part, computed in ((m.hot, hot), (arrived, cold)) if computed]
        return (*back, ("merge", layer.blocks.merge(m.x[:tokens], sums)))

    def _crossing(self, tokens: int, end: str, here: Tensor, *, out: bool) -> Work:
        """Copy ``here`` to the host's buffer named ``end`` (``out``), or from that buffer."""
        windows = self._windows(tokens)
        there_end: Tensor = getattr(windows or self._memory.host, end)[:tokens]
        source, target = (here[:tokens], there_end) if out else (there_end, here[:tokens])
        return partial(through if windows else copy, source, target)

    def _windows(self, tokens: int) -> Landing | None:
        """The windows for a single token; many tokens are copied in bulk."""
        return self._memory.windows if tokens == 1 else None


def _all(works: Sequence[Work]) -> None:
    for work in works:
        work()
