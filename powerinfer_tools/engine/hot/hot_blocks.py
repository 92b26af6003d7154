"""The blocks of :mod:`powerinfer_tools.model.blocks` on a device: what one layer, and the head, launch."""

from dataclasses import dataclass
from functools import partial

import torch

from powerinfer_tools.engine.hot.hot_ffn import Joining
from powerinfer_tools.engine.hot.hot_operations import HotOperations, HotValue, Written
from powerinfer_tools.engine.hot.placed import Named, Placed
from powerinfer_tools.engine.hot.work import Work
from powerinfer_tools.model import blocks
from powerinfer_tools.model.loading import Model
from powerinfer_tools.model.streams import Along

Tensor = torch.Tensor


@dataclass(frozen=True)
class HotBlocks:
    """Layer ``index`` of ``model``; ``rounds``: the FFN's input is also needed as the integer kernels round
    it."""

    model: Model
    index: int
    placed: Placed
    named: Named
    rounds: bool

    def mix(self, x: Tensor) -> Written:
        """Add the output of the token mixer to the residual stream ``x`` (T, width)."""
        ops, model = self._writer(x), self.model
        layer = model.layers[self.index]
        blocks.mix(ops, model.spec, model.hyper, self.index, layer, HotValue("x", x), Along())
        return ops.written()

    @property
    def norms_input(self) -> bool:
        """Whether the FFN's input is a norm of the stream, not the stream itself."""
        return self.model.layers[self.index].ffn_norm is not None

    def ffn_input(self, x: Tensor, shown: Tensor | None = None) -> Work:
        """Work that fills the buffers "normed" from the stream ``x`` (T, width); ``shown``, if given,
        replaces the exact one."""
        layer = self.model.layers[self.index]
        elsewhere = {} if shown is None else {"normed": shown}
        ops = HotOperations(self.placed, self.named, len(x), elsewhere)
        normed = blocks.ffn_input(ops, layer.ffn_norm, self.model.hyper.norm_eps, HotValue("x", x))
        if self.rounds:
            ops.round(normed)
        return ops.written().before

    @property
    def joins(self) -> Joining | None:
        """How the FFN's sum joins the stream; None where it is normalised first."""
        layer = self.model.layers[self.index]
        if layer.ffn_post_norm is not None:
            return None
        bias = None if layer.ffn_down_bias is None else self.placed.vector(layer.ffn_down_bias)
        return Joining(bias, self.model.hyper.residual_scale)

    def merge(self, x: Tensor, sums: list[Tensor]) -> Work:
        """As the host merges: cold part + hot part + bias, its norm, then to the stream ``x`` (T, width);
        ``sums`` of one side or of both; the first may be overwritten."""
        if self.placed.fused and len(x) == 1 and (joins := self.joins) is not None:
            return partial(_join, x, sums, joins)
        ops, layer, hyper = self._writer(x), self.model.layers[self.index], self.model.hyper
        total, *others = (HotValue("sum", part) for part in sums)
        for other in others:
            total = ops.join(total, other)
        if layer.ffn_down_bias is not None:
            total = ops.plus(total, layer.ffn_down_bias)
        total = blocks.post_normed(ops, total, layer.ffn_post_norm, hyper.post_norm_eps)
        ops.join(HotValue("x", x), total, hyper.residual_scale)
        return ops.written().before

    def _writer(self, x: Tensor) -> HotOperations:
        return HotOperations(self.placed, self.named, len(x))


def _join(x: Tensor, sums: list[Tensor], how: Joining) -> None:
    from powerinfer_kernels.triton_launch import join

    join(x, sums[0], sums[1] if len(sums) > 1 else None, how.bias, how.factor)


def head(model: Model, placed: Placed, named: Named, x: Tensor) -> Work:
    """Logits of the rows ``x`` (rows, width) of the residual stream, in the buffer "logits"."""
    ops = HotOperations(placed, named, len(x))
    blocks.head(ops, model, model.head, HotValue("head_input", x))
    return ops.written().before
