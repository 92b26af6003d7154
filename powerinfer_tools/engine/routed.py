"""A layer of routed experts.

Which experts a token takes is known only while it is computed. So each expert is a range of operations of its
own, and is run for the tokens that take it: its input rows are gathered, its output is weighted and added up,
expert by expert in ascending order, which makes a token's sum the same in every batch. Experts that a hot
side computes are no operations here, and neither is the router of a layer whose attention it computes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from powerinfer_kernels import Matrix, Pool
from powerinfer_tools.engine.blocks import BlockWriter, DenseColumns, pack
from powerinfer_tools.engine.buffers import Buffers, Floats
from powerinfer_tools.engine.cold_ffn import Computed
from powerinfer_tools.engine.hot.routes import SHARED, Route
from powerinfer_tools.engine.observation import LayerCounters
from powerinfer_tools.model.ffn_matrices import DenseFFN, ExpertsFFN
from powerinfer_tools.model.hyperparameters import Hyperparameters, Routing

#: Runs operations [first, last) for some tokens.
Run = Callable[[int, int, int], None]


@dataclass(frozen=True)
class RoutedBuffers:
    """Buffers that the routed layers of a model share; float32 [tokens, …]."""

    scores: Floats  # (T, experts): what the router says
    shared_score: Floats  # (T, 1): before the sigmoid
    rows: Floats  # (T, width): the input of one expert
    out: Floats  # (T, width): the output of one expert


def routed_buffers(hyper: Hyperparameters, buffers: Buffers) -> RoutedBuffers | None:
    """Some of ``buffers``; None for a model without experts."""
    routing = hyper.routing
    if routing is None:
        return None
    return RoutedBuffers(
        scores=buffers.scratch.named("scores_of_experts", routing.experts),
        shared_score=buffers.scratch.named("shared_score", 1),
        rows=buffers.scratch.named("expert_rows", hyper.width),
        out=buffers.scratch.named("expert_out", hyper.width),
    )


def route(scores: npt.NDArray[np.floating[Any]], routing: Routing) -> list[list[tuple[int, float]]]:
    """The experts that each token takes, ascending, and their weights: the softmax of its ``scores``
    (tokens, experts) at its largest ``used`` values (ties: the lower expert), divided by their sum where
    ``normalized``. A row's weights do not depend on the others; where a score is not finite, they are not
    numbers."""
    order = np.argsort(-scores, axis=1, kind="stable")  # what is not a number comes last
    best, last = order[:, : routing.used].tolist(), order[:, -1].tolist()
    rows = zip(scores.tolist(), best, last, strict=True)
    return [_weighted(row, first, end, routing) for row, first, end in rows]


def _weighted(scores: list[float], best: list[int], last: int, routing: Routing) -> list[tuple[int, float]]:
    """The experts ``best`` of one token, of which the first has the largest of ``scores``, with weights."""
    top = math.nan if math.isnan(scores[last]) else scores[best[0]]
    best.sort()
    counted = [scores[expert] for expert in best] if routing.normalized else scores
    powers = [math.exp(score - top) for score in counted]
    total = math.fsum(powers)
    if not routing.normalized:
        powers = [powers[expert] for expert in best]
    return [(expert, power / total) for expert, power in zip(best, powers, strict=True)]


class RoutedFFN:
    """The experts of one layer, those that the kernels compute laid out for them; others (``hot``, by number)
    are a hot side's, and with ``scored_there`` the router is.

    :meth:`write` appends operations that leave the router's scores (where it is here), then those of experts.
    Where there are scores, :meth:`routes` says what tokens take, and :meth:`work` leaves the sum of the
    experts that are here in ``block_out``.
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
    ) -> None:
        self._routing, self._observed, self.hot = routing, observed, hot
        self._scored_there = scored_there
        self._router = None if scored_there else pack(pool, ffn.router)
        self._experts = {
            index: _columns(pool, ffn.expert(index)) for index in range(routing.experts) if index not in hot
        }
        here = ffn.shared is not None and SHARED not in hot
        self._shared = _columns(pool, ffn.shared) if ffn.shared is not None and here else None
        gate = None if scored_there else ffn.shared_gate
        self._shared_gate = None if gate is None else pack(pool, gate)
        self._ranges: dict[int, tuple[int, int]] = {}
        self._hot_bytes = _hot_bytes(ffn, routing, hot)
        self._passes = self._taken = 0  # forward passes, and experts that some token of a pass took

    @property
    def nbytes(self) -> int:
        """Size of the weights as laid out here, in bytes."""
        return self._always + sum(_nbytes(expert) for expert in self._experts.values())

    def bytes_per_token(self, computed: Computed) -> float:
        """Bytes that one decoded token touches, on both sides, but for a router that is there; ``computed``
        does not matter."""
        return self._touched(self._routing.used)

    def bytes_per_pass(self) -> float:
        """Mean bytes that a forward pass touched so far, on both sides: of an expert once, however many
        tokens take it."""
        return self._touched(self._taken / self._passes if self._passes else self._routing.used)

    def _touched(self, experts: float) -> float:
        routed, shared = self._hot_bytes
        size = (routed + sum(_nbytes(expert) for expert in self._experts.values())) / self._routing.experts
        return self._always + shared + experts * size

    @property
    def quantized(self) -> bool:
        """Whether the layer's input is needed in its quantised form."""
        return not all(matrix.row_type.is_float for matrix in self._whole)

    def write(self, writer: BlockWriter, buffers: Buffers, routed: RoutedBuffers) -> int:
        """Append the operations; returns where the scores have to be there."""
        self._buffers, self._scratch = buffers, routed
        builder = writer.builder
        if self._router is not None:
            writer.label("router")
            builder.matmul(self._router, buffers.normed, buffers.normed_acts, routed.scores)
        if self._shared_gate is not None:
            builder.matmul(self._shared_gate, buffers.normed, buffers.normed_acts, routed.shared_score)
        ready = writer.label("ffn")
        if self._shared is not None:
            if self._scored_there:
                writer.ops.changed(buffers.normed)
            self._ranges[SHARED] = writer.expert(self._shared, buffers.normed, "block_out")
        for index, expert in self._experts.items():
            writer.ops.changed(routed.rows)
            self._ranges[index] = writer.expert(expert, routed.rows, "expert_out")
        return ready

    def routes(self, count: int) -> list[Route]:
        """What ``count`` tokens take: the shared expert, then each that some token takes, ascending."""
        taken: dict[int, tuple[list[int], list[float]]] = {}
        for token, chosen in enumerate(route(self._scratch.scores[:count], self._routing)):
            for expert, weight in chosen:
                tokens, weights = taken.setdefault(expert, ([], []))
                tokens.append(token)
                weights.append(weight)
        routes = [Route(expert, *taken[expert]) for expert in sorted(taken)]
        self._passes, self._taken = self._passes + 1, self._taken + len(routes)
        if self._routing.shared_neurons:
            routes.insert(0, Route(SHARED, range(count), _sigmoid(self._scratch.shared_score[:count])))
        self._count(routes)
        return routes

    def work(self, routes: Sequence[Route], count: int, run: Run) -> None:
        """Compute ``routes``, none of them hot, for ``count`` tokens with ``run``."""
        scratch, out = self._scratch, self._buffers.block_out[:count]
        if not (routes and routes[0].expert == SHARED):
            out[:] = 0
        if count == 1:  # all experts read the same row
            scratch.rows[0] = self._buffers.normed[0]
        for taken in routes:
            factors = np.array(taken.weights, np.float32)[:, None]
            if taken.expert == SHARED:
                run(*self._ranges[SHARED], count)
                out *= factors
            elif count == 1:
                run(*self._ranges[taken.expert], 1)
                out += factors * scratch.out[:1]
            else:
                tokens = list(taken.tokens)
                np.take(self._buffers.normed, tokens, axis=0, out=scratch.rows[: len(tokens)])
                run(*self._ranges[taken.expert], len(tokens))
                out[tokens] += factors * scratch.out[: len(tokens)]

    def _count(self, routes: Sequence[Route]) -> None:
        seen = self._observed
        if seen is None:
            return
        for taken in routes:
            if taken.expert != SHARED:
                squares = np.array(taken.weights, np.float32).astype(np.float64) ** 2
                seen.counts[taken.expert] += len(squares)
                seen.gate_squares[taken.expert] += math.fsum(squares)
                seen.up_squares[taken.expert] += len(squares)

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


def _sigmoid(scores: Floats) -> list[float]:
    """1 / (1 + e^-score), value by value: the same whatever stands beside it."""
    return [1.0 / (1.0 + math.exp(-min(max(score, -80.0), 80.0))) for score in scores.ravel().tolist()]
