"""The sums of a profile while it is being made."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from powerinfer_formats.profile import ExpertSums, LayerSums, Profile, round_squares
from powerinfer_formats.profile_sums import add_sums
from powerinfer_tools.engine.observation import ExpertCounters, LayerCounters, counters, expert_counters
from powerinfer_tools.model.architectures import RELU_FAMILY
from powerinfer_tools.model.hyperparameter_types import LayerFacts
from powerinfer_tools.model.loading import Model

Squares = npt.NDArray[np.float64]


class Tally:
    """Counters that the kernels fill, and the sums of squares of all windows closed so far. ``inside``: the
    neurons inside experts are counted, too, where their activation makes exact zeros.

    Squares are rounded window by window (see :func:`powerinfer_formats.profile.round_squares`), which is what
    makes merged shards equal to the whole.
    """

    def __init__(self, model: Model, files: int, *, inside: bool = True) -> None:
        routing = model.hyper.routing
        units = [_units(model, facts) for facts in model.hyper.facts]
        histogram = routing is None and not model.exact_zeros
        # Squares of all layers lie in one array each, so that a window is closed in a few calls of numpy.
        self._open, self._closed = np.zeros((2, sum(units))), np.zeros((2, sum(units)))
        open_parts = _parts(self._open, units)
        inside = inside and model.hyper.activation in RELU_FAMILY
        fresh = [
            expert_counters(count, model.hyper.neurons)
            if inside and facts.ffn == "experts"
            else counters(count, histogram=histogram)
            for count, facts in zip(units, model.hyper.facts, strict=True)
        ]
        self.counters: Sequence[LayerCounters] = tuple(
            replace(made, gate_squares=gate, up_squares=up)
            for made, (gate, up) in zip(fresh, open_parts, strict=True)
        )
        self._squares = _parts(self._closed, units)
        kinds = [facts.ffn for facts in model.hyper.facts]
        self._whole = [i for i, kind in enumerate(kinds) if routing and kind == "dense" and units[i] == 1]
        self._none = [index for index, kind in enumerate(kinds) if kind == "none"]
        #: What the kernels fill: nothing of a dense layer that counts as one expert, or of one without FFN.
        self.observed: Sequence[LayerCounters | None] = tuple(
            None if index in (*self._whole, *self._none) else counted
            for index, counted in enumerate(self.counters)
        )
        self.file_tokens = [0] * files

    @property
    def tokens(self) -> int:
        """Tokens counted so far."""
        return sum(self.file_tokens)

    def close_window(self, file: int, tokens: int) -> None:
        """Take a window of ``tokens`` tokens of ``file`` into the sums."""
        for layer in self._none:
            if (histogram := self.counters[layer].histogram) is not None:
                histogram[:, 0] += np.uint32(tokens)
        for layer in self._whole:
            counted = self.counters[layer]
            counted.counts[:] += np.uint64(tokens)
            counted.gate_squares[:] = counted.up_squares[:] = tokens
        self._closed += round_squares(self._open)
        self._open[:] = 0.0
        self.file_tokens[file] += tokens

    def sums(self) -> tuple[LayerSums, ...]:
        """What has been counted in whole windows."""
        return tuple(
            LayerSums(
                counts=counted.counts.copy() if counted.histogram is None else None,
                histogram=None if counted.histogram is None else counted.histogram.copy(),
                gate_squares=_saturated(gate),
                up_squares=_saturated(up),
                inside=ExpertSums(counted.seen.copy(), counted.active.copy())
                if isinstance(counted, ExpertCounters)
                else None,
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
            if isinstance(counted, ExpertCounters) and sums.inside is not None:
                counted.seen[:] = sums.inside.tokens
                counted.active[:] = sums.inside.active
            squares[0][:] = sums.gate_squares
            squares[1][:] = sums.up_squares
        for entry in profile.corpus:
            self.file_tokens[names.index(entry.name)] = entry.tokens


def _parts(squares: Squares, units: Sequence[int]) -> list[tuple[Squares, Squares]]:
    """Views of ``squares`` (2, all units) for each layer: of gates, and of ups."""
    ends = np.cumsum(units)[:-1]
    return list(zip(np.split(squares[0], ends), np.split(squares[1], ends), strict=True))


def _units(model: Model, facts: LayerFacts) -> int:
    """How many units a layer counts: experts, by the tokens that take each, as one that is not taken adds
    exactly nothing; or neurons. Beside experts, a dense FFN is one that every token takes, unless its
    activation makes exact zeros; a layer without FFN has one unit, which is never active."""
    routing = model.hyper.routing
    if facts.ffn == "experts":
        assert routing is not None
        return routing.experts
    return facts.neurons if facts.ffn == "dense" and (routing is None or model.exact_zeros) else 1


def _saturated(squares: Squares) -> Squares:
    """The limit that merging has, too."""
    zero = np.zeros_like(squares)
    part = LayerSums(None, None, squares, squares)
    return add_sums([part, LayerSums(None, None, zero, zero)]).gate_squares
