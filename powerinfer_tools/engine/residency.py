"""Experts of a model larger than memory: all of them stay on disk, some are in memory as well, and the others
are read when a token takes them, or two layers earlier, where their router is likely to choose them.

The experts in memory follow use. A wrong guess costs bandwidth. The sums equal those of the model in memory,
bit for bit, because the program is the same and waits for the experts that its routers chose.
"""

import math
import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from powerinfer_kernels import UNITS_AHEAD, Choice, KernelError, Matrix
from powerinfer_tools.engine.blocks import BlockWriter, DenseColumns, pack
from powerinfer_tools.engine.buffers import Floats
from powerinfer_tools.engine.units_on_disk import READERS, UnitsOnDisk
from powerinfer_tools.engine.values import Value
from powerinfer_tools.engine.weights_on_disk import Budget
from powerinfer_tools.errors import ModelError
from powerinfer_tools.model.ffn_matrices import ExpertsFFN
from powerinfer_tools.model.hyperparameter_types import Routing
from powerinfer_tools.model.loading import Model

#: Number of tokens after which a use counts half.
HALF_LIFE = 16.0
#: Published adaptive caches with 30 % of the experts in memory held 95 % of the experts that tokens took. So
#: a share s of the experts is taken to hold 1 - (1 - s)^PUBLISHED_SKEW.
PUBLISHED_SKEW = math.log(1 - 0.95) / math.log(1 - 0.3)
#: Bytes that are read to measure the disk's speed, if no profile says which experts to read.
_TRIED_BYTES = 64 << 20


class Residency(UnitsOnDisk):
    """The experts of all layers of a model as units on disk."""

    what = "experts"

    def _add_units(self) -> None:
        self._columns: dict[int, dict[int, DenseColumns]] = {}
        self._first: dict[int, int] = {}
        self._routers: dict[int, Matrix] = {}
        self._ahead: list[Choice] = []
        for index, layer in enumerate(self.model.layers):
            if isinstance(layer.feeds, ExpertsFFN):
                self._add(index, layer.feeds)

    def _add(self, index: int, ffn: ExpertsFFN) -> None:
        self._first[index], self._columns[index] = self.units.count, {}
        for number in range(ffn.router.rows):
            expert = ffn.expert(number)
            gate, up, down = (self._absent(weight) for weight in (expert.first, expert.factor, expert.down))
            assert gate is not None
            assert down is not None
            self.units.add([part for part in (gate, up, down) if part is not None])
            columns = DenseColumns(gate.matrix, None if up is None else up.matrix, down.matrix)
            self._columns[index][number] = columns

    def least(self, batch: int) -> int:
        """Slots of each kind that a pass of ``batch`` tokens needs."""
        routing = _routing(self.model)
        return min(routing.experts, batch * routing.used)

    def suffices(self, nbytes: int, tokens: int) -> bool:
        """Whether there is room for one token more than the pass has, as experts that are read ahead need
        room."""
        return nbytes > 0 and min(self.slots(nbytes)) >= self.least(tokens) + self.least(1)

    def least_bytes(self, tokens: int) -> int:
        """The bytes of as many experts of each kind as the tokens of a pass may take in one layer."""
        return self.least(tokens) * sum(size for _, size in self.units.kinds) + self.readers_bytes

    def notice(self, nbytes: int) -> str:
        """How many experts are in memory."""
        slots, units = sum(self.slots(nbytes)), self.units.count
        return (
            f"{slots} of {units} experts ({slots / units:.0%}) are in memory at a time, the others are read "
            "from disk as they are needed"
        )

    def experts(self, layer: int) -> dict[int, DenseColumns]:
        """The matrices of the experts of ``layer``; they hold weights after a fetch."""
        return self._columns[layer]

    def router(self, layer: int) -> Matrix:
        """The router of ``layer``, which is always in memory."""
        if layer not in self._routers:
            feeds = self.model.layers[layer].feeds
            assert isinstance(feeds, ExpertsFFN)
            self._routers[layer] = pack(self._pool, feeds.router)
        return self._routers[layer]

    def write_fetch(self, writer: BlockWriter, layer: int, choice: Choice) -> None:
        """Append the operations that bring the experts in ``choice`` into memory, and request the experts
        that the next two layers are likely to take: their routers are applied to the present residual
        stream."""
        later = sorted(index for index in self._first if index > layer)[:UNITS_AHEAD]
        ahead = [
            (self._first[index], self._write_guess(writer, index, distance, choice))
            for distance, index in enumerate(later)
        ]
        writer.label("disk")
        writer.builder.fetch(self.units, self._first[layer], choice, ahead)

    def _write_guess(self, writer: BlockWriter, layer: int, distance: int, like: Choice) -> Choice:
        """Append the router of ``layer`` over the residual stream, and its choice."""
        weights, routing = self.model.layers[layer], _routing(self.model)
        ffn = weights.feeds
        assert isinstance(ffn, ExpertsFFN)
        scores = writer.buffers.scratch.named("scores_ahead", routing.experts)
        if distance == len(self._ahead):
            self._ahead.append(Choice.new(len(like.chosen), like.experts, like.used))
        writer.label("router")
        source, norm = Value(writer.buffers.x), weights.ffn_norm
        if ffn.norms is not None:
            norm = ffn.norms.router
        if norm is not None and not writer.spec.early_router:
            source = writer.ops.norm("normed_ahead", source, norm, writer.eps)
        write_scores(writer, self.router(layer), ffn, source.floats, scores)
        write_choice(writer, ffn, routing, scores, self._ahead[distance])
        return self._ahead[distance]

    def open(self, budget: Budget) -> None:
        """Allocate memory, and read the experts that were used most. Raises ModelError if the memory is not
        available or too small, or a file cannot be read."""
        slots, least = self.slots(budget.nbytes - self.readers_bytes), self.least(budget.batch)
        if min(slots) < min(least, min(count for count, _ in self.units.kinds)):
            raise ModelError(self.too_little(budget))
        self.units.open(self._files, slots, READERS, HALF_LIFE)
        self._is_open = True
        self.drop_pages()
        self._load(budget, slots, least)

    def _load(self, budget: Budget, slots: Sequence[int], least: int) -> None:
        """Read the most used experts into the slots. If use is not known, read only enough experts to measure
        the disk's speed. With a static placement, all experts stay but a small rest that changes hands."""
        use, started = np.zeros(self.units.count), time.perf_counter()
        for layer, first in self._first.items():
            if budget.use is not None:
                use[first : first + len(budget.use[layer])] = budget.use[layer]
        # The limit of a unit's count under constant use: a geometric sum.
        self.units.set_use(use * HALF_LIFE / np.log(2))
        order = np.argsort(-use, kind="stable")
        kinds = np.array([self.units.kind_of(unit) for unit in range(self.units.count)])
        hits, loaded = 0.0, 0
        try:
            for kind, count in enumerate(slots):
                size = self.units.kinds[kind][1]
                most = count if budget.use is not None else min(count, 1 + _TRIED_BYTES // size)
                mine = order[kinds[order] == kind][:most].astype(np.int32)
                stays = max(0, count - 2 * least) if budget.static else 0
                loaded += self.units.load(mine[:stays], fixed=True) * size
                loaded += self.units.load(mine[stays:]) * size
                hits += float(use[mine].sum())
        except KernelError:
            raise ModelError(self.problem() or "experts cannot be read") from None
        rate = loaded / max(time.perf_counter() - started, 1e-9)
        hit_share = hits / float(use.sum()) if use.any() else None
        self.expectation = self._expected(rate, sum(slots) / self.units.count, hit_share)

    def _expected(self, rate: float, resident: float, hit_share: float | None) -> str:
        """How fast the disk lets the model decode; computing may be slower. ``hit_share`` is the share in
        memory of the experts that the profile's tokens took, ``resident`` the share of all experts."""
        routing = _routing(self.model)
        token_bytes = self.whole_bytes * routing.used / routing.experts

        def speed(share: float) -> str:
            missing = token_bytes * (1 - share)
            return "any number of" if missing < 1 else f"{rate / missing:.3g}"

        speeds = f"at most {speed(resident)} tok/s where all experts are taken equally often"
        if hit_share is None:
            skewed = 1 - (1 - resident) ** PUBLISHED_SKEW
            speeds = (
                f"at most {speed(skewed)} tok/s with the skew published of other models ({skewed:.0%} "
                f"in memory when taken; there is no profile of this one, and what stays follows use); "
                f"{speeds}"
            )
        if hit_share is not None:
            share = f"{hit_share:.0%} of them in memory, as in the profile"
            speeds = f"at most {speed(hit_share)} tok/s with {share}; {speeds}"
        size = f"a token takes {token_bytes / 1e6:,.0f} MB of experts"
        return f"{size}; the disk brings {rate / 1e9:.2f} GB/s: {speeds}"

    def taken(self) -> npt.NDArray[np.int64]:
        """Tokens that took each expert so far, (layers, experts); zeros for layers without."""
        taken, experts = self.units.taken(), _routing(self.model).experts
        counts = np.zeros((len(self.model.layers), experts), np.int64)
        for layer, first in self._first.items():
            counts[layer] = taken[first : first + experts]
        return counts


def write_scores(
    writer: BlockWriter, router: Matrix, ffn: ExpertsFFN, source: Floats, scores: Floats
) -> None:
    """Append the product of a router with ``source``."""
    if not router.row_type.is_float:
        writer.ops.round(source)
    writer.builder.matmul(router, source, writer.ops.rounded(source), scores, bias=ffn.router_bias)


def write_choice(
    writer: BlockWriter,
    ffn: ExpertsFFN,
    routing: Routing,
    scores: Floats,
    choice: Choice,
    shared: tuple[Floats, Floats] | None = None,
) -> None:
    """Append the choice by ``scores``; ``shared``: the score of the shared expert, and its weight."""
    writer.builder.route(
        scores,
        choice,
        kind=routing.kind,
        bias=ffn.choice_bias,
        groups=routing.groups,
        groups_used=routing.groups_used,
        normalized=routing.normalized,
        scale=routing.scale,
        shared=shared,
    )


def _routing(model: Model) -> Routing:
    assert model.hyper.routing is not None
    return model.hyper.routing
