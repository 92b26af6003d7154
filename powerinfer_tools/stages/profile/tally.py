"""The sums of a profile while it is being made."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from powerinfer_formats.profile import LayerSums, Profile, round_squares
from powerinfer_formats.profile_sums import add_sums
from powerinfer_tools.engine.observation import LayerCounters, counters
from powerinfer_tools.model.loading import Model

Squares = npt.NDArray[np.float64]


class Tally:
    """Counters that the kernels fill, and the sums of squares of all windows closed so far.

    Squares are rounded window by window (see :func:`powerinfer_formats.profile.round_squares`), which is what
    makes merged shards equal to the whole.
    """

    def __init__(self, model: Model, files: int) -> None:
        hyper, routing = model.hyper, model.hyper.routing
        # With experts, the tokens that take each: an expert that is not taken adds exactly nothing.
        units = hyper.neurons if routing is None else routing.experts
        histogram = routing is None and not model.exact_zeros
        self.counters: Sequence[LayerCounters] = tuple(
            counters(units, histogram=histogram) for _ in range(hyper.layers)
        )
        self._squares: list[tuple[Squares, Squares]] = [
            (np.zeros(units), np.zeros(units)) for _ in range(hyper.layers)
        ]
        self.file_tokens = [0] * files

    @property
    def tokens(self) -> int:
        """Tokens counted so far."""
        return sum(self.file_tokens)

    def close_window(self, file: int, tokens: int) -> None:
        """Take a window of ``tokens`` tokens of ``file`` into the sums."""
        for layer, counted in enumerate(self.counters):
            gate, up = self._squares[layer]
            gate += round_squares(counted.gate_squares)
            up += round_squares(counted.up_squares)
            counted.gate_squares[:] = 0.0
            counted.up_squares[:] = 0.0
        self.file_tokens[file] += tokens

    def sums(self) -> tuple[LayerSums, ...]:
        """What has been counted in whole windows."""
        return tuple(
            LayerSums(
                counts=counted.counts.copy() if counted.histogram is None else None,
                histogram=None if counted.histogram is None else counted.histogram.copy(),
                gate_squares=_saturated(gate),
                up_squares=_saturated(up),
            )
            for counted, (gate, up) in zip(self.counters, self._squares, strict=True)
        )

    def restore(self, profile: Profile, names: Sequence[str]) -> None:
        """Continue from ``profile``, whose corpus are some of the files ``names``."""
        for counted, squares, sums in zip(self.counters, self._squares, profile.sums, strict=True):
            if counted.histogram is not None and sums.histogram is not None:
                counted.histogram[:] = sums.histogram
            elif sums.counts is not None:
                counted.counts[:] = sums.counts
            squares[0][:] = sums.gate_squares
            squares[1][:] = sums.up_squares
        for entry in profile.corpus:
            self.file_tokens[names.index(entry.name)] = entry.tokens


def _saturated(squares: Squares) -> Squares:
    """The limit that merging has, too."""
    zero = np.zeros_like(squares)
    part = LayerSums(None, None, squares, squares)
    return add_sums([part, LayerSums(None, None, zero, zero)]).gate_squares
