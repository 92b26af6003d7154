"""What the host does at the points of a pass where the hot device joins in."""

import time
from typing import Protocol

from powerinfer_tools.engine.buffers import Buffers, Floats, narrowed
from powerinfer_tools.engine.caches import Places
from powerinfer_tools.engine.hot import HotSide
from powerinfer_tools.engine.timeline import Timeline, tell


class Host(Protocol):
    """The layers as they are run outside the hot device."""

    @property
    def timeline(self) -> Timeline | None:
        """What the pass is recorded in, if at all."""

    def run(self, first: int, last: int, count: int, places: Places | None = None) -> None:
        """Run the operations from ``first`` to ``last`` over ``count`` tokens at ``places``; None: the
        operations do not ask where tokens stand."""


class HotSteps:
    """Hands work to the hot side, and does the cold work meanwhile: for ``count`` tokens at ``places``."""

    def __init__(self, hot: HotSide, buffers: Buffers, host: Host) -> None:
        self._hot, self._buffers, self._host = hot, buffers, host

    def split(self, index: int, cold: tuple[int, int], neurons: int, count: int, places: Places) -> None:
        """Layer ``index``, whose attention is the host's: its hot neurons there, the operations ``cold`` with
        all other ``neurons`` here."""
        buffers = self._buffers
        assert buffers.hot_out is not None
        begun = time.perf_counter()
        self._hot.launch(index, buffers.normed[:count], buffers.normed_acts, buffers.x[:count])
        launched = time.perf_counter()
        self._name(index, neurons, count)
        named = time.perf_counter()
        self._host.run(*cold, count, places)
        computed = time.perf_counter()
        self._hot.collect(buffers.hot_out[:count])
        tell(self._host.timeline, index, launch=(begun, launched), cold=(named, computed))
        tell(self._host.timeline, index, wait=(computed, time.perf_counter()))
        if self._hot.has_predictor(index):
            tell(self._host.timeline, index, wait=(launched, named))

    def there(
        self, index: int, cold: tuple[int, int], neurons: int, arrives: bool, count: int, places: Places
    ) -> None:
        """Layer ``index``, which leaves the residual stream on the device: the operations ``cold`` with its
        cold ``neurons`` here. ``arrives``: the stream is still here."""
        buffers, begun = self._buffers, time.perf_counter()
        if arrives:
            self._hot.enter(buffers.x[:count], places.position)
        self._hot.begin(index, count, places.position)
        launched = time.perf_counter()
        tell(self._host.timeline, index, launch=(begun, launched))
        if not neurons:
            self._hot.merge(index, None, count)
            return
        self._hot.ffn_input(index, buffers.normed[:count], buffers.x[:count])
        self._name(index, neurons, count)
        arrived = time.perf_counter()
        self._host.run(*cold, count, places)
        computed = time.perf_counter()
        self._hot.merge(index, buffers.block_out[:count], count)
        tell(self._host.timeline, index, wait=(launched, arrived), cold=(arrived, computed))

    def attention(self, index: int, arrives: bool, count: int, places: Places) -> None:
        """The attention of layer ``index`` alone; the residual stream comes back."""
        started = time.perf_counter()
        if arrives:
            self._hot.enter(self._buffers.x[:count], places.position)
        self._hot.begin(index, count, places.position)
        self._hot.leave(self._buffers.x[:count])
        tell(self._host.timeline, index, wait=(started, time.perf_counter()))

    def leave(self, count: int, places: Places) -> None:
        """The residual stream comes back."""
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
        """What the device did goes to the timeline, if there is one."""
        timeline = self._host.timeline
        if timeline is not None:
            for layer, span in self._hot.spans:
                timeline.add("hot side", span.name, layer, span.start, span.end)
        self._hot.spans.clear()

    def _name(self, index: int, neurons: int, count: int) -> None:
        """Where the device predicts, what it says of the cold ``neurons`` becomes their scores."""
        if neurons and self._hot.has_predictor(index):
            assert self._buffers.scores is not None
            self._hot.named(index, narrowed(self._buffers.scores, neurons)[:count])
