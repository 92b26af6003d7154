"""A layer of routed experts, as operations of the program: the router's choice, then all chosen experts at
once, added up in ascending order, which makes a token's sum the same in every batch. Experts on a hot side
have no operations here. Neither does the router of a layer whose attention the hot side computes.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np

from powerinfer_kernels import Choice, ExpertBuffers, ExpertWeights, Matrix, Pool
from powerinfer_tools.engine.blocks import BlockWriter, FFNOutput, pack, pack_columns, pack_picked
from powerinfer_tools.engine.buffers import Buffers, Floats
from powerinfer_tools.engine.cold_side import Computed, Plain
from powerinfer_tools.engine.hot.routes import SHARED, Route
from powerinfer_tools.engine.observation import LayerCounters
from powerinfer_tools.engine.residency import Residency, write_choice, write_scores
from powerinfer_tools.engine.values import Value
from powerinfer_tools.errors import ModelError
from powerinfer_tools.model.ffn_matrices import ExpertNorms, ExpertsFFN
from powerinfer_tools.model.hyperparameter_types import Hyperparameters, Routing
from powerinfer_tools.model.loading import Model


@dataclass(frozen=True)
class RoutedBuffers:
    """Buffers that the routed layers of a model share; float32 [tokens, …]."""

    normed: Floats  # (T, width): the input of the FFN and of its experts
    scores: Floats  # (T, experts): the router's scores
    shared_score: Floats  # (T, 1): before the sigmoid
    shared_weight: Floats  # (T, 1)
    choice: Choice
    pairs: ExpertBuffers

    @property
    def nbytes(self) -> int:
        """Size in bytes of the buffers that are not among the model's other buffers."""
        return self.pairs.nbytes + self.choice.chosen.nbytes + self.choice.weights.nbytes


def routed_buffers(hyper: Hyperparameters, buffers: Buffers, *, gated: bool) -> RoutedBuffers | None:
    """Buffers for as many tokens as ``buffers``; None for a model without experts. ``gated``: the experts
    have an up projection beside the gate."""
    routing, tokens = hyper.routing, buffers.scratch.tokens
    if routing is None:
        return None
    return RoutedBuffers(
        normed=buffers.normed,
        scores=buffers.scratch.named("scores_of_experts", routing.experts),
        shared_score=buffers.scratch.named("shared_score", 1),
        shared_weight=buffers.scratch.named("shared_weight", 1),
        choice=Choice.new(tokens, routing.experts, routing.used),
        pairs=ExpertBuffers.new(tokens * routing.used, hyper.width, hyper.neurons, gated=gated),
    )


class RoutedFFN(Plain):
    """The experts of one layer, laid out for the C kernels. The experts ``hot`` (by number) are on a hot side
    instead; with ``scored_there``, so is the router. With ``residency``, experts are read from disk as the
    experts of layer ``index``. Choices are added to ``observed``. ``skips``: zero neurons of routed experts
    are not read, with the same bits."""

    work = "experts"

    def __init__(
        self,
        model: Model,
        index: int,
        pool: Pool,
        routed: RoutedBuffers,
        hot: frozenset[int] = frozenset(),
        *,
        scored_there: bool = False,
        residency: Residency | None = None,
        observed: LayerCounters | None = None,
        skips: bool = False,
    ) -> None:
        ffn, routing = model.layers[index].ffn, model.hyper.routing
        assert isinstance(ffn, ExpertsFFN)
        assert routing is not None
        self._ffn, self._routing, self._spec, self._index = ffn, routing, model.spec, index
        self._buffers, self._hot, self._residency, self._observed = routed, hot, residency, observed
        self._source = routed.normed
        self._router: Matrix | None = None
        if skips and any(scale is not None for scale in ffn.scales):
            raise ModelError(
                f"{model.path}: layer {index} has routed experts whose matrices have a scale each, which "
                "are computed whole; leave out --mode gate-first"
            )
        if residency is not None and skips:
            raise ModelError(
                f"{model.path}: experts that are read from disk are computed whole; leave out --mode "
                "gate-first, or give them memory (--ram)"
            )
        if residency is not None:
            self._router, self._experts = residency.router(index), residency.experts(index)
        else:
            self._router = None if scored_there else pack(pool, ffn.router)
            here = (expert for expert in range(routing.experts) if expert not in hot)
            lay_out = partial(pack_picked, pool) if skips else partial(pack_columns, partial(pack, pool))
            self._experts = {expert: lay_out(ffn.expert(expert)) for expert in here}
        cold = ffn.shared is not None and SHARED not in hot
        self._shared = (
            pack_columns(partial(pack, pool), ffn.shared) if ffn.shared is not None and cold else None
        )
        gate = None if scored_there else ffn.shared_gate
        self._shared_gate = None if gate is None else pack(pool, gate)
        self._hot_bytes, self._skips = _hot_bytes(ffn, routing, hot), skips
        self._totals = np.zeros(2, np.int64)  # forward passes, and experts that some token of a pass took

    @property
    def neurons(self) -> int:
        """See :class:`ColdFFN`."""
        shared = 0 if self._shared is None else self._shared.gate.rows
        return shared + sum(expert.gate.rows for expert in self._experts.values())

    @property
    def nbytes(self) -> int:
        """Size of the weights without the experts that are read from disk, in bytes."""
        if self._residency is not None:
            return self._always
        return self._always + self._routed_bytes

    def bytes_per_token(self, computed: Computed) -> float:
        """Bytes on both sides, without a router on the hot side."""
        return self._touched(self._routing.used, computed)

    def bytes_per_pass(self, computed: Computed) -> float:
        """Bytes of each expert count once, however many tokens take it."""
        passes, taken = self._totals.tolist()
        return self._touched(taken / passes if passes else self._routing.used, computed)

    def _touched(self, experts: float, computed: Computed) -> float:
        routed, shared = self._hot_bytes
        here = float(self._routed_bytes)
        if self._skips:
            gates = sum(expert.gate.nbytes for expert in self._experts.values())
            here = gates + (here - gates) * computed.confirmed
        return self._always + shared + experts * (routed + here) / self._routing.experts

    @property
    def quantized(self) -> bool:
        """See :class:`ColdFFN`."""
        experts = [matrix for expert in self._experts.values() for matrix in expert.products]
        return not all(matrix.row_type.is_float for matrix in (*self._whole, *experts))

    def before(self, writer: BlockWriter) -> None:
        """See :class:`ColdFFN`."""
        if self._spec.early_router:
            self._write_router(writer, writer.buffers.x)
        if self._ffn.beside_norm is not None:
            self._source = writer.normed("expert_input", self._ffn.beside_norm)

    def choose(self, writer: BlockWriter, first: int) -> int:
        """See :class:`ColdFFN`."""
        if self._ffn.norms is not None:
            self._write_router(writer, writer.normed("router_input", self._ffn.norms.router))
            self._source = writer.normed("expert_input", self._ffn.norms.experts)
        elif not self._spec.early_router:
            self._write_router(writer, self._source)
        scratch, seen, shared = self._buffers, self._observed, None
        writer.label("router")
        if self._shared_gate is not None:
            acts = writer.buffers.normed_acts
            writer.builder.matmul(self._shared_gate, scratch.normed, acts, scratch.shared_score)
        if self._ffn.shared_gate is not None:
            shared = (scratch.shared_score, scratch.shared_weight)
        write_choice(writer, self._ffn, self._routing, scratch.scores, scratch.choice, shared)
        counted = () if seen is None else (seen.counts, seen.gate_squares, seen.up_squares)
        writer.builder.count_experts(scratch.choice, self._totals, *counted)
        if self._residency is not None:
            self._residency.write_fetch(writer, self._index, scratch.choice)
        return writer.label("ffn")

    def write(self, writer: BlockWriter, buffers: Buffers, output: FFNOutput) -> None:
        """See :class:`ColdFFN`."""
        if self._ffn.norms is not None:
            self._write_normed(writer, buffers, self._ffn.norms)
            return
        if self._shared is not None:
            writer.expert(self._shared, buffers.normed, "block_out")
            if self._ffn.shared_gate is not None:
                width = buffers.block_out.shape[1]
                writer.builder.multiply(self._buffers.shared_weight, buffers.block_out, width)
        if self._experts:
            self._write_routed(writer, accumulate=self._shared is not None)
        if self._ffn.shared is not None:
            writer.scale_block(self._spec.shared_factor)

    def _write_normed(self, writer: BlockWriter, buffers: Buffers, norms: ExpertNorms) -> None:
        """The experts and the FFN beside them, each normalised by itself."""
        self._write_routed(writer, accumulate=False)
        routed = writer.post_norm("experts_out", norms.experts_out)
        if self._shared is None:
            writer.ops.copy("block_out", Value(routed))
            return
        writer.expert(self._shared, buffers.normed, "block_out")
        writer.post_norm("block_out", norms.dense_out)
        writer.add_to_block(routed)

    def _write_routed(self, writer: BlockWriter, *, accumulate: bool) -> None:
        writer.experts(
            self._weights(),
            self._buffers.choice,
            self._buffers.pairs,
            self._source,
            accumulate=accumulate,
            weigh_input=self._routing.weigh_input,
        )

    def works(self, count: int) -> bool:
        """See :class:`ColdFFN`."""
        chosen = set(self._buffers.choice.chosen[:count].ravel().tolist())
        return self._shared is not None or not chosen <= self._hot

    def scores(self, count: int) -> tuple[Floats, Floats]:
        """See :class:`ColdFFN`."""
        return self._buffers.scores[:count], self._buffers.shared_score[:count]

    def hot_routes(self, count: int) -> list[Route]:
        """The shared expert, then each that some token takes, ascending."""
        if not self._hot:
            return []
        taken: dict[int, tuple[list[int], list[float]]] = {}
        choice = self._buffers.choice
        rows = zip(choice.chosen[:count].tolist(), choice.weights[:count].tolist(), strict=True)
        for token, (chosen, factors) in enumerate(rows):
            for expert, factor in zip(chosen, factors, strict=True):
                if expert in self._hot:
                    tokens, weights = taken.setdefault(expert, ([], []))
                    tokens.append(token)
                    weights.append(factor)
        routes = [Route(expert, *taken[expert]) for expert in sorted(taken)]
        if SHARED in self._hot:
            weights = [1.0] * count
            if self._ffn.shared_gate is not None:
                weights = self._buffers.shared_weight[:count].ravel().tolist()
            routes.insert(0, Route(SHARED, range(count), weights))
        return routes

    def _write_router(self, writer: BlockWriter, source: Floats) -> None:
        """Append the router alone, over ``source``, if the host computes it."""
        writer.label("router")
        if self._router is not None:
            write_scores(writer, self._router, self._ffn, source, self._buffers.scores)

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

    @property
    def _whole(self) -> list[Matrix]:
        """The matrices that every token is multiplied with, except the shared expert's down projection."""
        shared = () if self._shared is None else self._shared.products
        return [matrix for matrix in (self._router, self._shared_gate, *shared) if matrix is not None]

    @property
    def _always(self) -> int:
        down = 0 if self._shared is None else self._shared.down.nbytes
        return down + sum(matrix.nbytes for matrix in self._whole)

    @property
    def _routed_bytes(self) -> int:
        return sum(expert.nbytes for expert in self._experts.values())


def _hot_bytes(ffn: ExpertsFFN, routing: Routing, hot: frozenset[int]) -> tuple[int, int]:
    """Bytes of the experts on the hot side: of the routed experts, and of the shared expert."""
    size = sum(stack.nbytes for stack in ffn.stacks) // routing.experts
    shared = 0 if ffn.shared is None else sum(weight.nbytes for weight in ffn.shared.matrices)
    return size * len(hot - {SHARED}), shared if SHARED in hot else 0
