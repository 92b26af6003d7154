"""The output norm and the head on a device: from the residual stream to logits."""

from dataclasses import dataclass

import torch

from powerinfer_tools.engine.hot.elementwise import HotNorm
from powerinfer_tools.engine.hot.hot_ffn import Inputs
from powerinfer_tools.engine.hot.products import Product

Tensor = torch.Tensor


@dataclass(frozen=True)
class HotHead:
    """``softcap`` c > 0: logits become c · tanh(logit / c). ``rows`` (rows, width) is the input, exact and
    rounded; ``logits`` (rows, vocabulary) the output; ``landing`` and ``host`` are the host's ends of copies
    of both; ``chunk`` flat scratch."""

    norm: HotNorm
    matrix: Product
    softcap: float
    rows: Inputs
    logits: Tensor
    landing: Tensor
    host: Tensor
    chunk: Tensor

    def compute(self, x: Tensor) -> None:
        """Logits of the rows ``x`` (rows, width) of the residual stream."""
        inputs, logits = self.rows.first(len(x)), self.logits[: len(x)]
        self.norm.into(x, inputs.exact, inputs.rounded if self.matrix.rounds else None)
        self.matrix.times(inputs, self.chunk, logits)
        if self.softcap:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)

    def copy_out(self, rows: int) -> None:
        """Device to host."""
        self.host[:rows].copy_(self.logits[:rows], non_blocking=True)
