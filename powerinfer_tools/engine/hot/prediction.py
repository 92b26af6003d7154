"""Predictors on a device: they name the neurons of a layer to compute, for both sides.

The side that runs a predictor decides for both. Inputs are rounded as by the integer kernels. So the device
and the host can name different neurons only if a score differs from its threshold by no more than the error
of float32 sums.
"""

from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from powerinfer_tools.engine.hot.devices import Steps
from powerinfer_tools.engine.hot.hot_ffn import Inputs
from powerinfer_tools.engine.hot.mapped import copy, through
from powerinfer_tools.engine.hot.products import Product, round_where_needed
from powerinfer_tools.model.device_memory import CHUNK_ROWS, TOKENS_AT_ONCE

Tensor = torch.Tensor
#: As in the C kernels: the largest magnitude in the code of a sign predictor's input, and the root mean
#: squares that it stands for.
SIGN_LARGEST, SIGN_RANGE = 15.0, 3.0


class Scorer(Protocol):
    """Gives each neuron a score."""

    @property
    def residual(self) -> bool:
        """Whether it reads the residual stream instead of the FFN's input."""

    def score(self, inputs: Inputs, out: Tensor) -> None:
        """out (T, neurons) = the scores for ``inputs`` (T, width); T is at most TOKENS_AT_ONCE."""


@dataclass(frozen=True)
class HotLowRank:
    """outward · a(inward · x); ``relu``: a sets negative values to 0. ``low`` (TOKENS_AT_ONCE, rank) is the
    input's short form, exact and rounded; ``chunk`` flat scratch."""

    inward: Product
    outward: Product
    residual: bool
    relu: bool
    low: Inputs
    chunk: Tensor

    def score(self, inputs: Inputs, out: Tensor) -> None:
        """See :class:`Scorer`."""
        low = self.low.first(len(out))
        self.inward.times(inputs, self.chunk, low.exact)
        if self.relu:
            low.exact.relu_()
        round_where_needed(low, self.outward)
        self.outward.times(low, self.chunk, out)


@dataclass(frozen=True)
class HotSigns:
    """step · Σ_j s_ij · q_j, for signs s of the gate's weights, one bit each: uint8 (neurons, width / 8,
    rounded up), 1 where negative."""

    signs: Tensor
    residual: bool = False

    def score(self, inputs: Inputs, out: Tensor) -> None:
        """See :class:`Scorer`; the sum is exact, in whole numbers below 2^24."""
        x = inputs.exact
        scale = torch.sqrt(x.square().mean(dim=-1, keepdim=True))
        step = scale * (SIGN_RANGE / SIGN_LARGEST)
        inverse = step.reciprocal().masked_fill(step == 0, 0.0)
        codes = (x * inverse).round().clamp(-SIGN_LARGEST, SIGN_LARGEST)
        bits = torch.arange(8, device=x.device, dtype=torch.uint8)
        for first in range(0, len(self.signs), CHUNK_ROWS):
            last = min(first + CHUNK_ROWS, len(self.signs))
            negative = (self.signs[first:last, :, None] >> bits) & 1
            rows = 1.0 - 2.0 * negative.view(last - first, -1)[:, : x.shape[1]].to(torch.float32)
            out[:, first:last] = torch.mm(codes, rows.T)
        out *= step


@dataclass(frozen=True)
class HotPredictor:
    """One layer's predictor. ``scores`` (TOKENS_AT_ONCE, neurons) and ``stream`` (TOKENS_AT_ONCE, width), the
    residual stream exact and rounded, are scratch; ``counts`` int64 (3,): hot neurons not named,
    and with ``checks`` active hot neurons, and active hot neurons that were named."""

    scorer: Scorer
    threshold: Tensor
    scores: Tensor
    stream: Inputs
    hot: int
    counts: Tensor
    checks: bool = False

    @property
    def left_out(self) -> Tensor:
        """Hot neurons that were not named, int64 (1,)."""
        return self.counts[:1]

    def name(self, inputs: Inputs, x: Tensor, named: Tensor) -> None:
        """named uint8 (T, neurons) = 1 where the score is not at or below the threshold; a score that is no
        number names its neuron. ``inputs`` (T, width) are the FFN's, ``x`` the residual stream they were
        made from."""
        for first in range(0, len(named), TOKENS_AT_ONCE):
            last = min(first + TOKENS_AT_ONCE, len(named))
            source = inputs.between(first, last)
            if self.scorer.residual:
                source = self.stream.first(last - first)
                source.exact.copy_(x[first:last])
                if source.apart:
                    source.round()
            scores = self.scores[: last - first]
            self.scorer.score(source, scores)
            named[first:last] = ~(scores <= self.threshold)
        self.left_out.add_(len(named) * self.hot - named[:, : self.hot].sum())

    def forget(self) -> None:
        """Begin counting anew."""
        self.counts.zero_()


@dataclass(frozen=True)
class Naming:
    """The buffers for the named neurons, one layer at a time: flat uint8, on the device and (for cold
    neurons) on the host. ``window``: the host's buffer as a tensor that kernels can access, if possible."""

    device: Tensor
    host: Tensor
    window: Tensor | None = None

    def steps(self, predictor: HotPredictor, inputs: Inputs, x: Tensor, *, cold: bool) -> Steps:
        """Name the neurons for ``inputs`` (T, width); with ``cold``, send the named cold neurons to the
        host."""
        named = self._whole(predictor, len(x))
        name = ("predictor", partial(predictor.name, inputs, x, named))
        if not cold:
            return (name,)
        window, source = self.window if len(x) == 1 else None, named[:, predictor.hot :]
        if window is None:
            return (name, ("copy out", partial(copy, source, self._of_cold(predictor, len(x)))))
        return (name, ("copy out", partial(through, source, window[: source.shape[1]].view(1, -1))))

    def of_hot(self, predictor: HotPredictor, tokens: int) -> Tensor:
        """uint8 (T, hot neurons) on the device."""
        return self._whole(predictor, tokens)[:, : predictor.hot]

    def of_cold(self, predictor: HotPredictor, tokens: int) -> npt.NDArray[np.uint8]:
        """uint8 (T, cold neurons) on the host, a view."""
        names: npt.NDArray[np.uint8] = self._of_cold(predictor, tokens).numpy()
        return names

    def _whole(self, predictor: HotPredictor, tokens: int) -> Tensor:
        neurons = len(predictor.threshold)
        return self.device[: tokens * neurons].view(tokens, neurons)

    def _of_cold(self, predictor: HotPredictor, tokens: int) -> Tensor:
        cold = len(predictor.threshold) - predictor.hot
        return self.host[: tokens * cold].view(tokens, cold)
