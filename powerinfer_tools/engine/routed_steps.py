"""What the host does in layers some of whose experts are a hot side's: it hands those over when the program
has chosen, and computes the others meanwhile."""

import time

from powerinfer_tools.engine.buffers import Buffers
from powerinfer_tools.engine.caches import Places
from powerinfer_tools.engine.hot import HotSide
from powerinfer_tools.engine.hot_steps import Host
from powerinfer_tools.engine.routed import RoutedBuffers, RoutedFFN
from powerinfer_tools.engine.timeline import tell


class RoutedSteps:
    """``count`` tokens at ``places``; ``hot`` is None where every expert is the host's."""

    def __init__(self, hot: HotSide | None, buffers: Buffers, routed: RoutedBuffers, host: Host) -> None:
        self._hot, self._buffers, self._routed, self._host = hot, buffers, routed, host

    def here(self, index: int, ffn: RoutedFFN, count: int, places: Places) -> None:
        """Layer ``index``, whose attention and router are the host's, after the choice: the sum of all
        experts that tokens take is left in ``block_out``, that of the hot ones added last."""
        buffers, side, started = self._buffers, self._hot, time.perf_counter()
        assert side is not None
        hot = ffn.hot_routes(count)
        if hot:
            side.launch(index, buffers.normed[:count], buffers.normed_acts, buffers.x[:count], hot)
        launched = time.perf_counter()
        self._work(ffn, count)
        computed = time.perf_counter()
        tell(self._host.timeline, index, launch=(started, launched), experts=(launched, computed))
        if hot:
            assert buffers.hot_out is not None
            side.collect(buffers.hot_out[:count])
            buffers.block_out[:count] += buffers.hot_out[:count]
            tell(self._host.timeline, index, wait=(computed, time.perf_counter()))

    def there(self, index: int, ffn: RoutedFFN, arrives: bool, count: int, places: Places) -> None:
        """Layer ``index``, whose attention and router are on the device, as the residual stream then is;
        ``arrives``: the stream is still here. The sum of the cold experts, if a token takes one, goes
        there."""
        buffers, side, routed = self._buffers, self._hot, self._routed
        assert side is not None
        begun = time.perf_counter()
        if arrives:
            side.enter(buffers.x[:count], places.position)
        side.begin(index, count, places.position)
        launched = time.perf_counter()
        side.router_scores(index, routed.scores[:count], routed.shared_score[:count])
        arrived = time.perf_counter()
        self._host.run(*ffn.choosing, count)
        hot, cold = ffn.hot_routes(count), ffn.works(count)
        chosen = time.perf_counter()
        if hot:
            side.experts(index, hot, count)
        queued = time.perf_counter()
        if cold:
            side.ffn_input(index, buffers.normed[:count], buffers.x[:count])
            self._work(ffn, count)
            tell(self._host.timeline, index, experts=(queued, time.perf_counter()))
        side.merge(index, buffers.block_out[:count] if cold else None, count)
        tell(self._host.timeline, index, launch=(begun, launched), wait=(launched, arrived))
        tell(self._host.timeline, index, route=(arrived, chosen))
        if hot:
            tell(self._host.timeline, index, launch=(chosen, queued))

    def _work(self, ffn: RoutedFFN, count: int) -> None:
        if ffn.empty:
            self._buffers.block_out[:count] = 0
        else:
            self._host.run(*ffn.working, count)
