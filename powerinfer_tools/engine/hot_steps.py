"""The host's work at the points of a pass where the hot device takes part."""

import time
from dataclasses import dataclass
from typing import Protocol

from powerinfer_tools.engine.buffers import Buffers, Floats, narrowed
from powerinfer_tools.engine.caches import Places
from powerinfer_tools.engine.cold_side import ColdFFN
from powerinfer_tools.engine.hot import HotSide
from powerinfer_tools.engine.timeline import Timeline, tell


class Host(Protocol):
    """The layers as they are run outside the hot device."""

    @property
    def timeline(self) -> Timeline | None:
        """The timeline that the pass is recorded in, if any."""

    def run(self, first: int, last: int, count: int, places: Places | None = None) -> None:
        """Run the operations from ``first`` to ``last`` over ``count`` tokens at ``places``. None: the
        operations do not depend on the positions of tokens."""


@dataclass(frozen=True)
class ColdPart:
    """The host's part of the FFN of layer ``index``: operations [first, ready) choose experts, and
    [ready, last) leave the sum of the cold part in ``block_out``."""

    index: int
    ffn: ColdFFN
    first: int
    ready: int
    last: int


class HotSteps:
    """Hands work to the hot side, and does the cold work meanwhile: for ``count`` tokens at ``places``."""

    def __init__(self, hot: HotSide, buffers: Buffers, host: Host) -> None:
        self._hot, self._buffers, self._host = hot, buffers, host

    def here(self, part: ColdPart, count: int, places: Places) -> None:
        """Run the FFN of a layer whose attention the host computes, and whose experts are chosen. The sum of
        both sides is left in ``block_out``; the hot part is added last."""
        buffers, index, begun = self._buffers, part.index, time.perf_counter()
        assert buffers.hot_out is not None
        routes, works = part.ffn.hot_routes(count), part.ffn.works(count)
        out, more = buffers.block_out[:count], buffers.hot_out[:count]
        if routes:
            x = buffers.x[:count]
            self._hot.launch(index, buffers.normed[:count], buffers.normed_acts, x, routes)
        launched = time.perf_counter()
        self._name(part, count)
        named = time.perf_counter()
        self._host.run(part.ready, part.last, count, places)
        computed = time.perf_counter()
        tell(self._host.timeline, index, launch=(begun, launched), **{part.ffn.work: (named, computed)})
        if routes:
            self._hot.collect(more if works else out)
            tell(self._host.timeline, index, wait=(computed, time.perf_counter()))
            if works:
                out += more
        if self._hot.has_predictor(index):
            tell(self._host.timeline, index, wait=(launched, named))

    def there(self, part: ColdPart, arrives: bool, count: int, places: Places) -> None:
        """Run a layer that leaves the residual stream on the device; ``arrives``: the stream is still on the
        host. If a token needs the cold part, its sum is sent to the device."""
        buffers, index, begun = self._buffers, part.index, time.perf_counter()
        if arrives:
            self._hot.enter(buffers.x[:count], places.position)
        self._hot.begin(index, count, places.position)
        launched = time.perf_counter()
        tell(self._host.timeline, index, launch=(begun, launched))
        if chooses := part.first < part.ready:
            self._choose(part, count)
        works, started = part.ffn.works(count), time.perf_counter()
        if works:
            self._hot.ffn_input(index, buffers.normed[:count], buffers.x[:count])
            self._name(part, count)
            arrived = time.perf_counter()
            self._host.run(part.ready, part.last, count, places)
            if not chooses:
                tell(self._host.timeline, index, wait=(started, arrived))
            tell(self._host.timeline, index, **{part.ffn.work: (arrived, time.perf_counter())})
        self._hot.merge(index, buffers.block_out[:count] if works else None, count)

    def attention(self, index: int, arrives: bool, count: int, places: Places) -> None:
        """Run only the attention of layer ``index`` on the device; the residual stream comes back."""
        started = time.perf_counter()
        if arrives:
            self._hot.enter(self._buffers.x[:count], places.position)
        self._hot.begin(index, count, places.position)
        self._hot.leave(self._buffers.x[:count])
        tell(self._host.timeline, index, wait=(started, time.perf_counter()))

    def leave(self, count: int, places: Places) -> None:
        """Bring the residual stream back from the device."""
        started = time.perf_counter()
        self._hot.leave(self._buffers.x[:count])
        tell(self._host.timeline, None, wait=(started, time.perf_counter()))

    def logits(self, first: int, last: int, *, stayed: bool) -> Floats:
        """Logits (rows, vocabulary) of the tokens ``first`` to ``last``; ``stayed``: the residual stream is
        on the device."""
        logits = self._hot.logits(None if stayed else self._buffers.x[first:last], first, last)
        self.keep_spans()
        return logits

    def keep_spans(self) -> None:
        """Add the device's work to the timeline, if there is one."""
        timeline = self._host.timeline
        if timeline is not None:
            for layer, span in self._hot.spans:
                timeline.add("hot side", span.name, layer, span.start, span.end)
        self._hot.spans.clear()

    def _choose(self, part: ColdPart, count: int) -> None:
        """Choose the experts of the layer by the scores of the device's router, and begin the hot experts
        there."""
        index, started = part.index, time.perf_counter()
        self._hot.router_scores(index, *part.ffn.scores(count))
        arrived = time.perf_counter()
        self._host.run(part.first, part.ready, count)
        routes, chosen = part.ffn.hot_routes(count), time.perf_counter()
        tell(self._host.timeline, index, wait=(started, arrived), route=(arrived, chosen))
        if routes:
            self._hot.experts(index, routes, count)
            tell(self._host.timeline, index, launch=(chosen, time.perf_counter()))

    def _name(self, part: ColdPart, count: int) -> None:
        """Where the device predicts, take its answer for the cold neurons as their scores."""
        neurons = part.ffn.neurons
        if neurons and self._hot.has_predictor(part.index):
            assert self._buffers.scores is not None
            self._hot.named(part.index, narrowed(self._buffers.scores, neurons)[:count])
