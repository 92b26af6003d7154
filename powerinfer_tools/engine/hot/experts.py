"""The hot experts of one layer on a device, and its router if the layer's attention is there.

Experts have a different form than the neurons of :mod:`~powerinfer_tools.engine.hot.hot_ffn`. A sorted neuron
has a row of the down projection, so that a layer splits between any two neurons, and idle rows are not read.
An expert keeps the matrices of the source bit for bit: its down projection has a row for each output, in
blocks that reach over neurons, and it is placed and computed as a whole. A dense FFN whose neurons are not
sorted is one expert that every token takes, with weight one: :class:`WholeFFN`.

The experts of a token are known only while it is computed: the caller routes, and passes for each expert the
tokens that take it and their weights. Sums are made expert by expert in that order, so they do not depend on
the other tokens of a batch, except for the order of float32 sums within matrix products.

A single token's experts are computed by two launches of fused kernels, if available. The numbers of the
experts are read on the device, so that a CUDA graph can hold the launches.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from powerinfer_tools.engine.hot.devices import Steps
from powerinfer_tools.engine.hot.hot_ffn import FusedRows, Inputs, Joining, Scratch, activate
from powerinfer_tools.engine.hot.mapped import copy, through
from powerinfer_tools.engine.hot.products import Product
from powerinfer_tools.engine.hot.routes import SHARED, Route
from powerinfer_tools.engine.hot.work import Work

if TYPE_CHECKING:
    from powerinfer_kernels.triton_launch import PlanarRows

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
    up: Product | None
    down: Product
    activation: tuple[str, float]

    def compute(self, inputs: Inputs, scratch: ExpertScratch, out: Tensor) -> None:
        """out (T, width) = (act(gate · x) · (up · x)) · downᵀ; without ``up``, act(gate · x) · downᵀ."""
        tokens, neurons = len(out), self.gate.count
        gate = scratch.gate[: tokens * neurons].view(tokens, neurons)
        gate_rows, up_rows = self.gate.rows, (self.up or self.gate).rows
        fused = tokens == 1 and self.gate.is_fused and (self.up or self.gate).is_fused
        if fused and isinstance(gate_rows, FusedRows) and isinstance(up_rows, FusedRows):
            from powerinfer_kernels import triton_launch

            x_gate, x_up = (inputs.taken_by(rows.row_type) for rows in (gate_rows, up_rows))
            factor = None if self.up is None else up_rows.planar
            triton_launch.hidden(x_gate, x_up, gate_rows.planar, factor, self.activation, gate)
            hidden = gate
        else:
            self.gate.times(inputs, scratch.chunk, gate)
            up = None
            if self.up is not None:
                up = scratch.up[: tokens * neurons].view(tokens, neurons)
                self.up.times(inputs, scratch.chunk, up)
            hidden = activate(gate, up, *self.activation)
        self.down.times(Inputs(hidden, hidden), scratch.chunk, out)


@dataclass(frozen=True)
class WholeFFN:
    """A dense FFN with the matrices of the source; ``scratch`` is the scratch memory of experts. It is used
    like a :class:`~powerinfer_tools.engine.hot.hot_ffn.HotFFN` without a predictor."""

    expert: HotExpert
    scratch: ExpertScratch

    @property
    def neurons(self) -> int:
        """All neurons of the layer."""
        return self.expert.gate.count

    @property
    def fused(self) -> bool:
        """Its sum is delivered by a step of its own."""
        return False

    def compute(
        self,
        inputs: Inputs,
        scratch: Scratch,
        out: Tensor,
        named: Tensor | None = None,
        joins: Joining | None = None,
    ) -> None:
        """out (T, width)."""
        assert named is None
        assert joins is None
        self.expert.compute(inputs, self.scratch, out)


@dataclass(frozen=True)
class ExpertStack:
    """The hot experts that a router chooses from, as one planar matrix of each kind; ``places``: the place of
    each expert in these matrices."""

    gate: "PlanarRows"
    up: "PlanarRows"
    down: "PlanarRows"
    neurons: int
    places: Mapping[int, int]
    activation: tuple[str, float]

    def add(self, inputs: tuple[Tensor, Tensor], routes: Routes, hidden: Tensor, out: Tensor) -> None:
        """out (1, width) += Σ weight · expert(x) for one token, over ``routes`` that have places instead of
        tokens, -1 for none; ``inputs`` of gate and of up, ``hidden`` (routes, neurons) scratch."""
        from powerinfer_kernels import triton_launch

        triton_launch.expert_hidden(*inputs, self.gate, self.up, routes.tokens, self.activation, hidden)
        triton_launch.expert_sums(hidden, self.down, routes.tokens, routes.weights, out)


@dataclass(frozen=True)
class HotExperts:
    """The hot experts of one layer, by number; none if only its attention is on the device. ``stack``: the
    experts other than the shared one, if fused kernels read them."""

    experts: Mapping[int, HotExpert]
    stack: ExpertStack | None = None

    def busiest(self, tokens: int) -> list[Route]:
        """The routes that need the most memory at a time: all of ``tokens`` to the widest expert."""
        widest = max(self.experts, key=lambda number: self.experts[number].gate.count)
        return [Route(widest, range(tokens), [0.0] * tokens)]

    def compute(
        self, inputs: Inputs, taken: Sequence[Taken], routes: Routes, scratch: ExpertScratch, out: Tensor
    ) -> None:
        """out (T, width) = Σ weight · expert(x) over ``taken``, in that order."""
        out.zero_()
        for part in taken:
            count, expert = part.last - part.first, self.experts[part.expert]
            tokens, weights = routes.tokens[part.first : part.last], routes.weights[part.first : part.last]
            source = inputs
            if len(out) > 1:
                source = scratch.taken.first(count)
                _gather(inputs, tokens, source, rounded=expert.gate.rounds)
            # The gathered input is no longer needed when the output of the expert is written.
            result = scratch.taken.exact[:count]
            expert.compute(source, scratch, result)
            result.mul_(weights[:, None])
            out.index_add_(0, tokens, result)

    def compute_one(self, inputs: Inputs, routes: Routes, scratch: ExpertScratch, out: Tensor) -> None:
        """:meth:`compute` for one token: ``routes`` have the shared expert first, then places in the stack,
        -1 for none, so that the same work suits every token."""
        assert self.stack is not None
        shared, stack = self.experts.get(SHARED), self.stack
        if shared is None:
            out.zero_()
        else:
            shared.compute(inputs, scratch, out)
            out.mul_(routes.weights[:1])
        chosen = Routes(routes.weights[1:], routes.tokens[1:])
        count = len(chosen.tokens)
        hidden = scratch.gate[: count * stack.neurons].view(count, stack.neurons)
        both = inputs.taken_by(stack.gate.row_type), inputs.taken_by(stack.up.row_type)
        stack.add(both, chosen, hidden, out)


def _gather(inputs: Inputs, tokens: Tensor, out: Inputs, *, rounded: bool) -> None:
    """Gather the rows ``tokens`` of both forms, or of the only form that all experts take."""
    if out.apart:
        torch.index_select(inputs.exact, 0, tokens, out=out.exact)
        torch.index_select(inputs.rounded, 0, tokens, out=out.rounded)
    else:
        torch.index_select(inputs.rounded if rounded else inputs.exact, 0, tokens, out=out.exact)


@dataclass(frozen=True)
class Dispatch:
    """The memory that the hot experts of all layers share: scratch, and the routes of tokens to experts, on
    both sides: float32 (2, T · ``taken``), weights, then rows of tokens as int32. ``taken``: the most experts
    of a token, the shared one included. ``window``: the host's buffer as a tensor that kernels can access, if
    possible."""

    host: Tensor
    window: Tensor | None
    device: Tensor
    scratch: ExpertScratch
    taken: int

    def steps(self, experts: HotExperts, routes: Sequence[Route], inputs: Inputs, out: Tensor) -> Steps:
        """out (T, width) = the sum over ``routes``, at least one, all of them to hot ``experts``. Writes
        where the device copies from: what was queued before must have been waited for."""
        taken = self._stage(routes)
        return (
            ("copy in", partial(self._copy_in, taken[-1].last)),
            ("hot", partial(experts.compute, inputs, taken, self._there, self.scratch, out)),
        )

    def steps_of_one(self, experts: HotExperts, inputs: Inputs, out: Tensor) -> Steps:
        """The same for one token, whatever experts it takes: :meth:`stage_one` sets them."""
        routes = Routes(self._there.weights[: self.taken], self._there.tokens[: self.taken])
        return (
            ("copy in", partial(self._copy_in, self.taken) if self.window is None else self._read),
            ("hot", partial(experts.compute_one, inputs, routes, self.scratch, out)),
        )

    def stage_one(self, experts: HotExperts, routes: Sequence[Route]) -> None:
        """Set the experts that the token takes in :meth:`steps_of_one`."""
        assert experts.stack is not None
        weights, places = (part[: self.taken] for part in self._here)
        weights[:], places[:], slot = 0.0, -1, 1
        for route in routes:
            if route.expert == SHARED:
                weights[0] = route.weights[0]
            else:
                weights[slot], places[slot] = route.weights[0], experts.stack.places[route.expert]
                slot += 1

    @property
    def _there(self) -> Routes:
        return Routes(self.device[0], self.device[1].view(torch.int32))

    @property
    def _here(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]:
        return self.host[0].numpy(), self.host[1].view(torch.int32).numpy()

    def _stage(self, routes: Sequence[Route]) -> list[Taken]:
        (weights, tokens), taken, first = self._here, list[Taken](), 0
        for route in routes:
            last = first + len(route.tokens)
            weights[first:last], tokens[first:last] = route.weights, route.tokens
            taken.append(Taken(route.expert, first, last))
            first = last
        return taken

    def _copy_in(self, count: int) -> None:
        """Two copies, as one with a gap is not direct."""
        for target, source in zip(self.device, self.host, strict=True):
            copy(source[:count], target[:count])

    def _read(self) -> None:
        """The routes of one token, copied as whole numbers: the second row is no float."""
        assert self.window is not None
        through(*(end.view(torch.int32)[:, : self.taken] for end in (self.window, self.device)))


@dataclass(frozen=True)
class RouterScores:
    """The scores of routers, float32 (T, experts), and the score of the shared expert, before the sigmoid,
    (T, 1)."""

    experts: Tensor
    shared: Tensor


@dataclass(frozen=True)
class HotRouter:
    """The router of a layer whose attention is on the device; the caller chooses by its scores. ``here`` and
    ``host`` are the device's and the host's buffers; ``windows`` are the host's buffers as tensors that
    kernels can access, if possible; ``chunk`` is flat scratch."""

    router: Product
    shared: Product | None
    here: RouterScores
    host: RouterScores
    windows: RouterScores | None
    chunk: Tensor

    def compute(self, inputs: Inputs) -> None:
        """Scores of the FFN's input (T, width)."""
        tokens = len(inputs.exact)
        self.router.times(inputs, self.chunk, self.here.experts[:tokens])
        if self.shared is not None:
            self.shared.times(inputs, self.chunk, self.here.shared[:tokens])

    def tell(self, tokens: int) -> Work:
        """The scores go to the host."""
        windows = self.windows if tokens == 1 else None
        return partial(self._tell, tokens, windows or self.host, copy if windows is None else through)

    def _tell(self, tokens: int, target: RouterScores, crossing: Callable[[Tensor, Tensor], None]) -> None:
        crossing(self.here.experts[:tokens], target.experts[:tokens])
        if self.shared is not None:
            crossing(self.here.shared[:tokens], target.shared[:tokens])
