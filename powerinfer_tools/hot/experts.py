"""The hot experts of one layer on a device.

Which experts a token takes is known only while it is computed: the caller routes, and says for each expert
which tokens take it and with what weight. Sums are made expert by expert in that order, so they do not depend
on what else is in a batch but for the order of float32 sums within matrix products.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from powerinfer_tools.hot.ffn import FusedRows, Inputs, activate
from powerinfer_tools.hot.products import Product

Tensor = torch.Tensor


@dataclass(frozen=True)
class Taken:
    """An expert and the tokens that take it: a range of :class:`Routes`."""

    expert: int
    first: int
    last: int


@dataclass(frozen=True)
class Routes:
    """float32 weights and int32 rows of tokens, each (T · experts of a token,), on one side."""

    weights: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class ExpertScratch:
    """Memory for one expert at work: flat float32 for a chunk of unpacked rows and for two products
    (T · neurons), and its input (as :class:`Inputs`, (T, width))."""

    chunk: Tensor
    taken: Inputs
    gate: Tensor
    up: Tensor


@dataclass(frozen=True)
class HotExpert:
    """One expert; ``activation`` has its name, and the cut of fatrelu."""

    gate: Product
    up: Product
    down: Product
    activation: tuple[str, float]

    def compute(self, inputs: Inputs, scratch: ExpertScratch, out: Tensor) -> None:
        """out (T, width) = (act(gate · x) · (up · x)) · downᵀ."""
        tokens, neurons = len(out), self.gate.count
        gate = scratch.gate[: tokens * neurons].view(tokens, neurons)
        if tokens == 1 and isinstance(self.gate.rows, FusedRows) and isinstance(self.up.rows, FusedRows):
            from powerinfer_kernels import triton_launch

            x_gate, x_up = inputs.of(self.gate.rows), inputs.of(self.up.rows)
            triton_launch.hidden(
                x_gate, x_up, self.gate.rows.planar, self.up.rows.planar, self.activation, gate
            )
            hidden = gate
        else:
            up = scratch.up[: tokens * neurons].view(tokens, neurons)
            self.gate.times(inputs, scratch.chunk, gate)
            self.up.times(inputs, scratch.chunk, up)
            hidden = activate(gate, up, *self.activation)
        self.down.times(Inputs(hidden, hidden), scratch.chunk, out)


@dataclass(frozen=True)
class HotExperts:
    """The hot experts of one layer, by number."""

    experts: Mapping[int, HotExpert]

    def compute(
        self, inputs: Inputs, taken: Sequence[Taken], routes: Routes, scratch: ExpertScratch, out: Tensor
    ) -> None:
        """out (T, width) = Σ weight · expert(x) over ``taken``, in that order."""
        out.zero_()
        for part in taken:
            count = part.last - part.first
            tokens, weights = routes.tokens[part.first : part.last], routes.weights[part.first : part.last]
            source = inputs if len(out) == 1 else _gathered(inputs, tokens, scratch.taken.first(count))
            # What was gathered is needed no more when the output of the expert is written.
            result = scratch.taken.exact[:count]
            self.experts[part.expert].compute(source, scratch, result)
            result.mul_(weights[:, None])
            out.index_add_(0, tokens, result)


def _gathered(inputs: Inputs, tokens: Tensor, out: Inputs) -> Inputs:
    torch.index_select(inputs.exact, 0, tokens, out=out.exact)
    if out.rounded is not out.exact:
        torch.index_select(inputs.rounded, 0, tokens, out=out.rounded)
    return out
