"""The output norm and the head on a device: from the residual stream to logits."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from powerinfer_tools.engine.hot.devices import Steps
from powerinfer_tools.engine.hot.work import Work

Tensor = torch.Tensor


@dataclass(frozen=True)
class HotHead:
    """``rows`` (rows, width) receives rows of the host's stream; ``logits`` (rows, vocabulary) is the output;
    ``landing`` and ``host`` are the host's buffers for copies of both; ``write`` gives the launches for rows
    of the stream."""

    write: Callable[[Tensor], Work]
    rows: Tensor
    logits: Tensor
    landing: Tensor
    host: Tensor

    def steps(self, rows: Tensor) -> Steps:
        """Logits of ``rows`` of the stream, which are on the device, to the host."""
        return (("head", self.write(rows)), ("copy out", partial(self._copy_out, len(rows))))

    def arriving(self, rows: int) -> Steps:
        """The same of rows that come from the host."""
        return (("copy in", partial(self._copy_in, rows)), *self.steps(self.rows[:rows]))

    def _copy_in(self, rows: int) -> None:
        self.rows[:rows].copy_(self.landing[:rows], non_blocking=True)

    def _copy_out(self, rows: int) -> None:
        self.host[:rows].copy_(self.logits[:rows], non_blocking=True)
