"""A layer of routed experts.

Which experts a token takes is known only while it is computed. So each expert is a range of operations of its
own, and is run for the tokens that take it: its input rows are gathered, its output is weighted and added up,
expert by expert in ascending order, which makes a token's sum the same in every batch.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from powerinfer_kernels import Activations, Matrix, Pool, aligned
from powerinfer_tools.engine.blocks import BlockWriter, DenseColumns, pack
from powerinfer_tools.engine.buffers import Buffers, Floats, activations
from powerinfer_tools.engine.observation import LayerCounters
from powerinfer_tools.hyperparameters import Hyperparameters, Routing
from powerinfer_tools.model import DenseFFN, ExpertsFFN

#: Runs operations [first, last) for some tokens.
Run = Callable[[int, int, int], None]


@dataclass(frozen=True)
class RoutedBuffers:
    """Scratch that the routed layers of a model share; float32 [tokens, …]."""

    scores: Floats  # (T, experts): what the router says
    shared_score: Floats  # (T, 1): before the sigmoid
    rows: Floats  # (T, width): the input of one expert
    rows_acts: Activations | None
    out: Floats  # (T, width): the output of one expert
    hidden_acts: Activations | None  # of one expert
    shared_acts: Activations | None  # of the shared expert

    @property
    def nbytes(self) -> int:
        """Size of all buffers in bytes."""
        acts = [a for a in (self.rows_acts, self.hidden_acts, self.shared_acts) if a is not None]
        floats = (self.scores, self.shared_score, self.rows, self.out)
        return sum(a.q.nbytes + a.d.nbytes + a.s.nbytes for a in acts) + sum(f.nbytes for f in floats)


def routed_buffers(hyper: Hyperparameters, tokens: int) -> RoutedBuffers | None:
    """Scratch for up to ``tokens`` tokens; None for a model without experts."""
    routing = hyper.routing
    if routing is None:
        return None
    shared = routing.shared_neurons
    return RoutedBuffers(
        scores=aligned((tokens, routing.experts), np.float32),
        shared_score=aligned((tokens, 1), np.float32),
        rows=aligned((tokens, hyper.width), np.float32),
        rows_acts=activations(tokens, hyper.width),
        out=aligned((tokens, hyper.width), np.float32),
        hidden_acts=activations(tokens, hyper.neurons),
        shared_acts=activations(tokens, shared) if shared else None,
    )


def route(scores: Sequence[float], routing: Routing) -> list[tuple[int, float]]:
    """The experts that a token takes, ascending, and their weights: the softmax of ``scores`` at its largest
    ``used`` values (ties: the lower expert), divided by their sum where ``normalized``."""
    top = max(scores)
    powers = [math.exp(score - top) for score in scores]
    best = sorted(range(len(scores)), key=lambda expert: (-scores[expert], expert))[: routing.used]
    total = math.fsum(powers[expert] for expert in best) if routing.normalized else math.fsum(powers)
    return [(expert, powers[expert] / total) for expert in sorted(best)]


class RoutedFFN:
    """The experts of one layer, laid out for the kernels.

    :meth:`write` appends operations that leave the router's scores and the shared expert's output;
    :meth:`work`, called where those have run, leaves the layer's sum in ``block_out``.
    """

    def __init__(self, ffn: ExpertsFFN, routing: Routing, pool: Pool, observed: LayerCounters | None) -> None:
        self._routing, self._observed = routing, observed
        self._router = pack(pool, ffn.router)
        self._experts = [_columns(pool, ffn.expert(index)) for index in range(routing.experts)]
        self._shared = None if ffn.shared is None else _columns(pool, ffn.shared)
        self._shared_gate = None if ffn.shared_gate is None else pack(pool, ffn.shared_gate)
        self._ranges: list[tuple[int, int]] = []

    @property
    def nbytes(self) -> int:
        """Size of the weights as laid out, in bytes."""
        return self._always + sum(_nbytes(expert) for expert in self._experts)

    def bytes_per_token(self, density: float) -> float:
        """Bytes that one decoded token touches; ``density`` does not matter."""
        experts = sum(_nbytes(expert) for expert in self._experts)
        return self._always + experts * self._routing.used / self._routing.experts

    @property
    def quantized(self) -> bool:
        """Whether the layer's input is needed in its quantised form."""
        return not all(matrix.row_type.is_float for matrix in self._whole)

    def write(self, writer: BlockWriter, buffers: Buffers, routed: RoutedBuffers) -> int:
        """Append the operations; returns where :meth:`work` comes in."""
        self._buffers, self._scratch = buffers, routed
        builder = writer.builder
        builder.matmul(self._router, buffers.normed, buffers.normed_acts, routed.scores)
        if self._shared is not None:
            writer.expert(
                self._shared, buffers.normed, buffers.normed_acts, routed.shared_acts, buffers.block_out
            )
        if self._shared_gate is not None:
            builder.matmul(self._shared_gate, buffers.normed, buffers.normed_acts, routed.shared_score)
        ready = builder.mark()
        for expert in self._experts:
            first = builder.mark()
            if not (expert.gate.row_type.is_float and expert.up is not None and expert.up.row_type.is_float):
                assert routed.rows_acts is not None
                builder.quantize(routed.rows, routed.rows_acts)
            writer.expert(expert, routed.rows, routed.rows_acts, routed.hidden_acts, routed.out)
            self._ranges.append((first, builder.mark()))
        return ready

    def work(self, count: int, run: Run) -> None:
        """Route ``count`` tokens and compute their experts with ``run``."""
        scratch, out = self._scratch, self._buffers.block_out[:count]
        if self._shared is None:
            out[:] = 0
        elif self._shared_gate is not None:
            out *= _sigmoid(scratch.shared_score[:count])
        for expert, takers in enumerate(self._takers(count)):
            if not takers:
                continue
            tokens, weights = (list(some) for some in zip(*takers, strict=True))
            np.take(self._buffers.normed, tokens, axis=0, out=scratch.rows[: len(tokens)])
            run(*self._ranges[expert], len(tokens))
            factors = np.array(weights, np.float32)[:, None]
            out[tokens] += factors * scratch.out[: len(tokens)]
            self._count(expert, factors)

    def _takers(self, count: int) -> list[list[tuple[int, float]]]:
        """The tokens that take each expert, with their weights."""
        takers: list[list[tuple[int, float]]] = [[] for _ in self._experts]
        for token, scores in enumerate(self._scratch.scores[:count].tolist()):
            for expert, weight in route(scores, self._routing):
                takers[expert].append((token, weight))
        return takers

    def _count(self, expert: int, factors: Floats) -> None:
        seen = self._observed
        if seen is None:
            return
        seen.counts[expert] += len(factors)
        seen.gate_squares[expert] += math.fsum((factors.astype(np.float64) ** 2).ravel())
        seen.up_squares[expert] += len(factors)

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


def _sigmoid(scores: Floats) -> Floats:
    """1 / (1 + e^-score), value by value: the same whatever stands beside it."""
    flat = [1.0 / (1.0 + math.exp(-min(max(score, -80.0), 80.0))) for score in scores.ravel().tolist()]
    return np.array(flat, np.float32).reshape(scores.shape)
