"""The output norm and the head on a device: from the residual stream to logits."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from powerinfer_tools.engine.hot.devices import Work

Tensor = torch.Tensor


@dataclass(frozen=True)
class HotHead:
    """``rows`` (rows, width) is where rows of the host's stream arrive; ``logits`` (rows, vocabulary) the
    output; ``landing`` and ``host`` are the host's ends of copies of both; ``write`` says what to launch for
    rows of the stream."""

    write: Callable[[Tensor], Work]
    rows: Tensor
    logits: Tensor
    landing: Tensor
    host: Tensor

    def copy_out(self, rows: int) -> None:
        """Device to host."""
        self.host[:rows].copy_(self.logits[:rows], non_blocking=True)
