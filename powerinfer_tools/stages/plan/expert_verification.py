"""Predicted against measured time of a token of a mixture of experts, over numbers of hot experts.

As for neurons (:mod:`powerinfer_tools.stages.plan.verification`): what is no expert's is measured once; the
experts' time is predicted as plans do it, from what single experts took in the same run. Torch's CPU device
computes on the cores of the cold side, so its time is added, not overlapped: so much for each byte of the
experts that a token takes there, and so much for each layer in which it takes one. Both come from the splits
with the fewest and the most hot experts, which are no rows.

Time depends on what a text makes the routers choose, and a dozen tokens are no corpus. They are drawn from
the model's own predictions, predicted times count with the share of their choices that is hot, and what the
profile lets expect of that stands beside.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import numpy.typing as npt

from powerinfer_formats.hardware import FFNCurve
from powerinfer_formats.plan import Plan
from powerinfer_formats.profile import Profile
from powerinfer_kernels import Pool, RowType, read_bandwidth
from powerinfer_tools.detect import torch_version
from powerinfer_tools.engine import Engine
from powerinfer_tools.engine.observation import counters
from powerinfer_tools.errors import PlanError
from powerinfer_tools.measure.random_ffns import FEW_LAYERS, FFNLayers, FFNShape
from powerinfer_tools.model.loading import Model
from powerinfer_tools.model.matrices import MatrixShape
from powerinfer_tools.model.shapes import shape_of_model
from powerinfer_tools.progress import Progress
from powerinfer_tools.stages.plan.costs import Gpu, Machine
from powerinfer_tools.stages.plan.expert_memory import experts_of
from powerinfer_tools.stages.plan.experts import mean_seconds
from powerinfer_tools.stages.plan.frequencies import model_frequencies
from powerinfer_tools.stages.plan.verification_rows import (
    DECODED,
    PROMPT,
    QUANTILE,
    Decoding,
    Verification,
    VerifyRow,
    vram_of,
)

_ROUNDS = 4
#: Splits with a hot side: the first and the last measure torch's CPU device.
_SPLITS = 5
_SHARES = (0.125, 0.875)
#: Bytes of experts beyond which no cache holds them.
_ENOUGH = 640 << 20
_SEED = 1
#: An accelerator that takes a second for each byte: its times are counts.
_COUNTER = Gpu("counter", 1, 1.0, 0.0, 0.0, 1e300, 0.0)


@dataclass(frozen=True)
class Parts:
    """Of a token's experts, all layers: expected bytes of hot ones, layers in which some is hot, and seconds
    of the cold ones."""

    hot_bytes: float
    waits: float
    cold_seconds: float


@dataclass(frozen=True)
class Text:
    """Tokens to time, and the share of the routers' choices for them that the first n experts of each layer
    have, busiest first by the profile [layers, experts + 1]."""

    tokens: tuple[int, ...]
    choices: npt.NDArray[np.float64]


def without_shared(plan: Plan) -> Plan:
    """``plan`` with every expert hot but those that every token takes, so that any split is less."""
    # The bytes of the plan are those of another placement; here they are not counted.
    layers = tuple(
        replace(
            layer,
            hot_neurons=plan.model.neurons,
            attention="cpu",
            vram_bytes=0,
            ram_bytes=0,
            shared_expert=None if layer.shared_expert is None else "cpu",
        )
        for layer in plan.layers
    )
    return replace(plan, layers=layers, units=(), memory=replace(plan.memory, vram_used=0, ram_used=0))


class ExpertGrid:
    """What is known of the model, and the splits to measure; ``model`` is the source."""

    def __init__(self, model: Model, profile: Profile) -> None:
        self.shape = shape_of_model(model)
        if len(set(self.shape.layers)) > 1:
            raise PlanError(f"{model.path}: --verify measures models whose layers are alike")
        self.layer, self.layers = self.shape.layers[0], len(self.shape.layers)
        self.experts = experts_of(self.layer)
        known = model_frequencies(self.shape, profile).layers
        assert known is not None  # there is a profile
        self._frequencies = known
        self.text = _text(model, profile)

    def hot_counts(self) -> list[int]:
        """Hot experts of each layer, of the splits with a hot side, ascending: none without torch. Beyond a
        size, torch's CPU device keeps experts as they are and unpacks them for every use; all splits are on
        one side of it."""
        if torch_version() is None:
            return []
        from powerinfer_tools.engine.hot.assembly import UNPACKED_LIMIT

        count = self.experts.count
        low, high = (round(share * count) for share in _SHARES)
        low, high = max(1, low), min(count - 1, high)
        values = self.layers * sum(matrix.rows * matrix.columns for matrix in self.layer.ffn)
        unpacked = min(high, UNPACKED_LIMIT // (4 * values))
        if low <= unpacked < high:
            low, high = max([(low, unpacked), (unpacked + 1, high)], key=lambda ends: ends[1] - ends[0])
        return sorted({round(hot) for hot in np.linspace(low, high, _SPLITS)}) if low < high else []

    def run(self, split: Path, threads: int | None, progress: Progress) -> Verification:
        """Measure in rounds, then predict."""
        counts = self.hot_counts()
        samples: dict[int, list[float]] = {hot: [] for hot in (0, *counts)}
        shared: list[float] = []
        progress.start("measuring", _ROUNDS * len(samples), "splits")
        with Pool(threads) as pool:
            bench = _Bench(pool, [self.layer.ffn, *([self.experts.shared] if self.experts.shared else [])])
            for _ in range(_ROUNDS):
                for hot in samples:
                    bench.sample()
                    vram, device = partial(vram_of, hot=hot), "cpu" if hot else "none"
                    taken, besides = Decoding(split, "dense", device, vram, self.text.tokens).run(threads)
                    samples[hot] += taken
                    shared += besides
                    progress.advance(1)
        progress.finish()
        return self.verification(samples, float(np.quantile(shared, QUANTILE)), bench.machine())

    def verification(self, samples: dict[int, list[float]], shared: float, machine: Machine) -> Verification:
        """Rows from ``samples`` (seconds of tokens by number of hot experts), the ``shared`` seconds of a
        token that are no expert's, and a ``machine`` with curves of the experts."""
        measured = {hot: float(np.quantile(times, QUANTILE)) for hot, times in samples.items()}
        parts = self.parts(list(samples), machine)
        ends = [hot for hot in samples if hot]
        ends = [ends[0], ends[-1]] if ends else []
        left = [measured[hot] - shared - parts[hot].cold_seconds for hot in ends]
        per_byte, per_wait = _hot_costs([parts[hot] for hot in ends], left)
        rows = []
        for hot, times in samples.items():
            if hot in ends:
                continue
            part = parts[hot]
            predicted = shared + part.cold_seconds + per_byte * part.hot_bytes + per_wait * part.waits
            rows.append(
                VerifyRow(
                    device="cpu" if hot else "none",
                    mode="dense",
                    hot_share=hot / self.experts.count,
                    predicted_seconds=predicted,
                    measured_seconds=measured[hot],
                    spread=median(times) / measured[hot] - 1,
                    predicted_choices=self.expected_choices(hot),
                    measured_choices=float(self.text.choices[:, hot].mean()),
                )
            )
        return Verification(tuple(rows), self._notes(rows, ends))

    def parts(self, counts: list[int], machine: Machine) -> dict[int, Parts]:
        """What the planner's cost model says of each number of hot experts."""
        counting, found = replace(machine, gpu=_COUNTER), {}
        for hot in counts:
            layers = [mean_seconds(self.layer, hot, share, counting) for share in self.text.choices[:, hot]]
            hot_bytes, cold_seconds, waits = (sum(part) for part in zip(*layers, strict=True))
            found[hot] = Parts(hot_bytes, waits, cold_seconds)
        return found

    def expected_choices(self, hot: int) -> float:
        """The share of the routers' choices that the busiest ``hot`` experts have by the profile."""
        shares = [float(known[:hot].sum() / known.sum()) for known in self._frequencies]
        return sum(shares) / len(shares)

    def _notes(self, rows: list[VerifyRow], ends: list[int]) -> tuple[str, ...]:
        if not ends and torch_version() is None:
            return ("torch is not installed: splits with a hot side are left out",)
        if not ends:
            return ("there are too few experts for splits with a hot side",)
        off = max(abs(row.predicted_choices - row.measured_choices) for row in rows)  # type: ignore[operator]
        return (
            "the share of what routers chose that was hot is off by up to "
            f"{100 * off:.1f} points, for the tokens that were timed, from what the profile lets expect",
        )


class _Bench:
    """Times single experts of some shapes, pass by pass: gate, up and down as the engine lays them out."""

    def __init__(self, pool: Pool, shapes: list[tuple[MatrixShape, ...]]) -> None:
        self._pool, self._shapes = pool, shapes
        self._experts, self._small = [], []
        for matrices in shapes:
            types = tuple(RowType[matrix.row_type.name] for matrix in matrices)
            shape = FFNShape(matrices[0].columns, matrices[0].rows, types, expert=True)
            count = max(2, -(-_ENOUGH // sum(matrix.nbytes for matrix in matrices)))
            self._experts.append(FFNLayers(pool, shape, shape.dense, (), count))
            self._small.append(FFNLayers(pool, shape.smallest, shape.dense, (), FEW_LAYERS))
        self._nbytes = count * sum(matrix.nbytes for matrix in matrices)
        self._times: list[list[tuple[float, float]]] = [[] for _ in shapes]
        self._streams: list[float] = []
        for layers in (*self._experts, *self._small):  # the first pass brings pages and threads in
            layers.seconds("dense", 1.0)

    def sample(self) -> None:
        """One pass of every shape."""
        for layers, small, times in zip(self._experts, self._small, self._times, strict=True):
            times.append((layers.seconds("dense", 1.0), small.seconds("dense", 1.0)))
        self._streams.append(read_bandwidth(self._pool, self._nbytes, 0.05))

    def machine(self) -> Machine:
        """This machine with a curve for each shape."""
        rate = float(np.quantile(self._streams, 1 - QUANTILE))
        curves = [self._curve(*found) for found in zip(self._shapes, self._times, strict=True)]
        return Machine("here", 1, rate, ((1.0, rate),), ffn_curves=tuple(curves))

    def _curve(self, matrices: tuple[MatrixShape, ...], times: list[tuple[float, float]]) -> FFNCurve:
        """An expert is computed whole: there is one density."""
        whole, small = (float(np.quantile(column, QUANTILE)) for column in zip(*times, strict=True))
        overhead = min(small, whole / 2)
        rate = sum(matrix.packed_nbytes for matrix in matrices) / (whole - overhead)
        gate, up, down = (matrix.row_type.name for matrix in matrices)
        sizes = (matrices[0].columns, matrices[0].rows)
        return FFNCurve(*sizes, gate, up, down, rate, (1.0,), (rate,), (rate,), overhead)


def _hot_costs(parts: list[Parts], left: list[float]) -> tuple[float, float]:
    """Seconds of a hot byte and of a layer with hot experts that explain what is ``left`` of two splits;
    neither is negative."""
    if not parts:
        return 0.0, 0.0
    fewest, most = parts
    both = np.array([[part.hot_bytes, part.waits] for part in parts])
    per_byte, per_wait = (float(cost) for cost in np.linalg.lstsq(both, np.array(left), rcond=None)[0])
    if per_wait < 0:
        return max(0.0, left[1] / most.hot_bytes), 0.0
    if per_byte < 0:
        return 0.0, max(0.0, left[0] / fewest.waits)
    return per_byte, per_wait


def _text(model: Model, profile: Profile) -> Text:
    """Tokens drawn one after the other from what ``model`` predicts, with a fixed seed."""
    routing, layers = model.hyper.routing, model.hyper.layers
    assert routing is not None
    seen = [counters(routing.experts, histogram=False) for _ in range(layers)]
    random, tokens = np.random.default_rng(_SEED), [model.gguf.get("tokenizer.ggml.bos_token_id", int, 1)]
    engine = Engine(model, context=PROMPT + DECODED, batch=1, observed=seen)
    try:
        for step in range(PROMPT + DECODED):
            if step == PROMPT:
                before = [layer.counts.copy() for layer in seen]
            logits = engine.decode(tokens[step]).astype(np.float64)
            chances = np.exp(logits - logits.max())
            tokens.append(int(random.choice(len(chances), p=chances / chances.sum())))
    finally:
        engine.close()
    shares = np.zeros((layers, routing.experts + 1))
    for index, layer in enumerate(seen):
        taken = (layer.counts - before[index])[profile.order(index)]
        shares[index, 1:] = np.cumsum(taken) / taken.sum()
    return Text(tuple(tokens[:-1]), shares)
