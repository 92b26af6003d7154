"""A layer of routed experts, as operations of the program: the router's choice, then all chosen experts at
once, added up in ascending order, which makes a token's sum the same in every batch. Experts that a hot side
computes are no operations here, and neither is the router of a layer whose attention it computes.
"""

from dataclasses import dataclass

import numpy as np

from powerinfer_kernels import Choice, ExpertBuffers, ExpertWeights, Matrix, Pool
from powerinfer_tools.engine.blocks import BlockWriter, DenseColumns, pack
from powerinfer_tools.engine.buffers import Buffers, Floats
from powerinfer_tools.engine.cold_ffn import Computed
from powerinfer_tools.engine.hot.routes import SHARED, Route
from powerinfer_tools.engine.observation import LayerCounters
from powerinfer_tools.engine.residency import Residency, write_choice, write_scores
from powerinfer_tools.model.ffn_matrices import DenseFFN, ExpertsFFN
from powerinfer_tools.model.hyperparameter_types import Hyperparameters, Routing


@dataclass(frozen=True)
class RoutedBuffers:
    """Buffers that the routed layers of a model share; float32 [tokens, …]."""

    scores: Floats  # (T, experts): what the router says
    shared_score: Floats  # (T, 1): before the sigmoid
    shared_weight: Floats  # (T, 1)
    choice: Choice
    pairs: ExpertBuffers

    @property
    def nbytes(self) -> int:
        """Size of what is not among the model's other buffers, in bytes."""
        return self.pairs.nbytes + self.choice.chosen.nbytes + self.choice.weights.nbytes


def routed_buffers(hyper: Hyperparameters, buffers: Buffers, *, gated: bool) -> RoutedBuffers | None:
    """Buffers for as many tokens as ``buffers`` have; None for a model without experts. ``gated``: they have
    up beside the rows that the activation reads."""
    routing, tokens = hyper.routing, buffers.scratch.tokens
    if routing is None:
        return None
    return RoutedBuffers(
        scores=buffers.scratch.named("scores_of_experts", routing.experts),
        shared_score=buffers.scratch.named("shared_score", 1),
        shared_weight=buffers.scratch.named("shared_weight", 1),
        choice=Choice.new(tokens, routing.experts, routing.used),
        pairs=ExpertBuffers.new(tokens * routing.used, hyper.width, hyper.neurons, gated=gated),
    )


class RoutedFFN:
    """The experts of one layer, those that the kernels compute laid out for them; others (``hot``, by number)
    are a hot side's, and with ``scored_there`` the router is. With ``disk``, they are read from there as that
    layer's.

    :meth:`write` appends operations that leave the router's scores (where it is here), those that choose
    (``choosing``), and those of the experts that are here (``working``), which leave their sum in
    ``block_out``. When it has chosen, :meth:`hot_routes` says what tokens take of a hot side's experts.
    """

    def __init__(
        self,
        ffn: ExpertsFFN,
        routing: Routing,
        pool: Pool,
        observed: LayerCounters | None,
        hot: frozenset[int] = frozenset(),
        *,
        scored_there: bool = False,
        disk: tuple[Residency, int] | None = None,
    ) -> None:
        self._routing, self._observed, self.hot, self._ffn = routing, observed, hot, ffn
        self._disk = disk
        self._scored_there = scored_there
        self._router: Matrix | None = None
        if disk is not None:
            residency, layer = disk
            self._router, self._experts = residency.router(layer), residency.experts(layer)
        else:
            self._router = None if scored_there else pack(pool, ffn.router)
            self._experts = {
                index: _columns(pool, ffn.expert(index))
                for index in range(routing.experts)
                if index not in hot
            }
        here = ffn.shared is not None and SHARED not in hot
        self._shared = _columns(pool, ffn.shared) if ffn.shared is not None and here else None
        gate = None if scored_there else ffn.shared_gate
        self._shared_gate = None if gate is None else pack(pool, gate)
        self._hot_bytes = _hot_bytes(ffn, routing, hot)
        self._totals = np.zeros(2, np.int64)  # forward passes, and experts that some token of a pass took

    @property
    def nbytes(self) -> int:
        """Size of the weights as laid out here, in bytes, but for experts that are read from disk."""
        if self._disk is not None:
            return self._always
        return self._always + sum(_nbytes(expert) for expert in self._experts.values())

    def bytes_per_token(self, computed: Computed) -> float:
        """Bytes that one decoded token touches, on both sides, but for a router that is there; ``computed``
        does not matter."""
        return self._touched(self._routing.used)

    def bytes_per_pass(self) -> float:
        """Mean bytes that a forward pass touched so far, on both sides: of an expert once, however many
        tokens take it."""
        passes, taken = self._totals.tolist()
        return self._touched(taken / passes if passes else self._routing.used)

    def _touched(self, experts: float) -> float:
        routed, shared = self._hot_bytes
        size = (routed + sum(_nbytes(expert) for expert in self._experts.values())) / self._routing.experts
        return self._always + shared + experts * size

    @property
    def quantized(self) -> bool:
        """Whether the layer's input is needed in its quantised form."""
        experts = [m for e in self._experts.values() for m in (e.gate, e.up) if m is not None]
        matrices = [*self._whole, *experts]
        return not all(matrix.row_type.is_float for matrix in matrices)

    @property
    def empty(self) -> bool:
        """Whether nothing that the kernels compute adds to the layer's sum."""
        return self._shared is None and not self._experts

    def write_router(self, writer: BlockWriter, source: Floats, routed: RoutedBuffers) -> None:
        """Append the router alone, where it is here, over ``source``."""
        writer.label("router")
        if self._router is not None:
            write_scores(writer, self._router, self._ffn, source, routed.scores)

    def write(self, writer: BlockWriter, buffers: Buffers, routed: RoutedBuffers, source: Floats) -> None:
        """Append what comes after the router; experts that a router chooses read ``source``."""
        self._scratch, builder = routed, writer.builder
        writer.label("router")
        if self._shared_gate is not None:
            builder.matmul(self._shared_gate, buffers.normed, buffers.normed_acts, routed.shared_score)
        first = writer.mark()
        self._choose(writer, routed)
        if self._disk is not None:
            residency, layer = self._disk
            residency.write_fetch(writer, layer, routed.choice)
        begin = writer.label("ffn")
        self.choosing = (first, begin)
        if self._scored_there:
            writer.ops.changed(buffers.normed)
            if self.quantized:
                writer.ops.round(buffers.normed)
        if self._shared is not None:
            writer.expert(self._shared, buffers.normed, "block_out")
            if self._ffn.shared_gate is not None:
                width = buffers.block_out.shape[1]
                writer.builder.multiply(routed.shared_weight, buffers.block_out, width)
        if self._experts:
            accumulate = self._shared is not None
            weigh_input = self._routing.weigh_input
            writer.experts(
                self._weights(),
                routed.choice,
                routed.pairs,
                source,
                accumulate=accumulate,
                weigh_input=weigh_input,
            )
        self.working = (begin, writer.mark())

    def _choose(self, writer: BlockWriter, routed: RoutedBuffers) -> None:
        seen, gated = self._observed, self._ffn.shared_gate is not None
        shared = (routed.shared_score, routed.shared_weight) if gated else None
        write_choice(writer, self._ffn, self._routing, routed.scores, routed.choice, shared)
        counted = () if seen is None else (seen.counts, seen.gate_squares, seen.up_squares)
        writer.builder.count_experts(routed.choice, self._totals, *counted)

    def _weights(self) -> ExpertWeights:
        experts = [self._experts.get(index) for index in range(self._routing.experts)]
        gate, up, down = self._ffn.biases
        first, factor = (up, None) if self._ffn.gate is None else (gate, up)
        return ExpertWeights(
            [None if one is None else one.gate for one in experts],
            None if self._ffn.gate is None else [None if one is None else one.up for one in experts],
            [None if one is None else one.down for one in experts],
            first,
            factor,
            down,
        )

    def hot_routes(self, count: int) -> list[Route]:
        """What ``count`` tokens take of the hot side's experts: the shared one, then each that some token
        takes, ascending."""
        if not self.hot:
            return []
        taken: dict[int, tuple[list[int], list[float]]] = {}
        choice = self._scratch.choice
        rows = zip(choice.chosen[:count].tolist(), choice.weights[:count].tolist(), strict=True)
        for token, (chosen, factors) in enumerate(rows):
            for expert, factor in zip(chosen, factors, strict=True):
                if expert in self.hot:
                    tokens, weights = taken.setdefault(expert, ([], []))
                    tokens.append(token)
                    weights.append(factor)
        routes = [Route(expert, *taken[expert]) for expert in sorted(taken)]
        if SHARED in self.hot:
            weights = [1.0] * count
            if self._ffn.shared_gate is not None:
                weights = self._scratch.shared_weight[:count].ravel().tolist()
            routes.insert(0, Route(SHARED, range(count), weights))
        return routes

    def works(self, count: int) -> bool:
        """Whether one of ``count`` tokens takes an expert that is here."""
        chosen = set(self._scratch.choice.chosen[:count].ravel().tolist())
        return self._shared is not None or not chosen <= self.hot

    @property
    def _whole(self) -> list[Matrix]:
        """What every token is multiplied with."""
        matrices = [self._router, self._shared_gate]
        if self._shared is not None:
            matrices += [self._shared.gate, self._shared.up]
        return [matrix for matrix in matrices if matrix is not None]

    @property
    def _always(self) -> int:
        down = 0 if self._shared is None else self._shared.down.nbytes
        return down + sum(matrix.nbytes for matrix in self._whole)


def _columns(pool: Pool, ffn: DenseFFN) -> DenseColumns:
    up = None if ffn.factor is None else pack(pool, ffn.factor)
    return DenseColumns(pack(pool, ffn.first), up, pack(pool, ffn.down))


def _nbytes(weights: DenseColumns) -> int:
    return weights.gate.nbytes + weights.down.nbytes + (0 if weights.up is None else weights.up.nbytes)


def _hot_bytes(ffn: ExpertsFFN, routing: Routing, hot: frozenset[int]) -> tuple[int, int]:
    """Bytes of the experts that are not here: of those that are routed, and of the shared one."""
    size = sum(stack.nbytes for stack in ffn.stacks) // routing.experts
    shared = 0 if ffn.shared is None else sum(weight.nbytes for weight in ffn.shared.matrices)
    return size * len(hot - {SHARED}), shared if SHARED in hot else 0
