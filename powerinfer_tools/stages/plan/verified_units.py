"""What verifying needs to know of a model's units: splits by the number of hot ones, a text, and what the
cost model says of each layer.

Time of neurons does not depend on the text; that of experts depends on what it makes the routers choose, and
a dozen tokens are no corpus. They are drawn from the model's own predictions, predicted times count with the
share of their choices that is hot, and what the profile lets expect of that stands beside.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from powerinfer_formats.predictors import Predictors
from powerinfer_formats.profile import Profile
from powerinfer_kernels import RowType
from powerinfer_tools.detect import torch_version
from powerinfer_tools.engine import Engine
from powerinfer_tools.engine.observation import counters
from powerinfer_tools.measure.random_ffns import FFNShape
from powerinfer_tools.model.counted_units import order_of
from powerinfer_tools.model.loading import Model
from powerinfer_tools.model.shapes import LayerShape, neuron_bytes, shape_of_model
from powerinfer_tools.stages.plan.costs import Gpu, Machine
from powerinfer_tools.stages.plan.experts import mean_seconds
from powerinfer_tools.stages.plan.ffn_levels import FFN, mode_seconds
from powerinfer_tools.stages.plan.frequencies import model_frequencies
from powerinfer_tools.stages.plan.memory import experts_of
from powerinfer_tools.stages.plan.offer import predictor_shapes
from powerinfer_tools.stages.plan.verification_rows import (
    ANY_TOKENS,
    DECODED,
    ENOUGH_BYTES,
    NO_TORCH,
    PROMPT,
    Parts,
    VerifyRow,
)

#: Hot shares of neurons in the rows, between those of the two splits that measure torch's CPU device; and
#: how many splits there are of experts.
HOT_SHARES = (0.25, 0.5, 0.75)
_ENDS = (0.125, 0.875)
_SPLITS = 5
#: Neurons that are placed together here.
GROUP = 32
_SEED = 1
#: An accelerator that takes a second for each byte: its times are counts.
_COUNTER = Gpu("counter", 1, 1.0, 0.0, 0.0, 1e300, 0.0)


@dataclass(frozen=True)
class Text:
    """Tokens to time, and of each layer the share of the routers' choices for them that the first n experts
    have, busiest first by the profile [n]; none without routers."""

    tokens: Sequence[int]
    choices: Sequence[npt.NDArray[np.float64]] = ()


class VerifiedUnits:
    """The units of ``model``, a source: of each layer its neurons, in groups, or its experts, as wholes."""

    def __init__(self, model: Model, profile: Profile, predictors: Predictors | None) -> None:
        self.shape = shape = shape_of_model(model)
        by_layer = model_frequencies(shape, profile).layers
        assert by_layer is not None  # there is a profile
        self._frequencies = by_layer
        shapes = predictor_shapes(predictors) if predictors else (None,) * len(shape.layers)
        self.ffns = [
            None
            if layer.experts is not None
            else FFN(layer, neuron_bytes(layer), frequencies, shape.exact_zeros, predictor)
            for layer, frequencies, predictor in zip(shape.layers, by_layer, shapes, strict=True)
        ]
        #: Dense, and where some layer has exact zeros, the modes that skip them.
        self.modes = ["dense"]
        if shape.exact_zeros and shape.ffn_layers:
            self.modes += ["gate-first", *(["predicted"] if all(shapes) else [])]
        #: Passes of a curve in each round: those of experts are short.
        self.passes = 5 if shape.routed else 1
        self.text = _text(model, profile) if shape.routed else Text(ANY_TOKENS)

    @property
    def alike(self) -> bool:
        """Whether all layers with a router are, and all others, each of which has an FFN."""
        others = {layer for layer in self.shape.layers if not layer.routed}
        return len(others) <= 1 >= len(set(self.shape.expert_layers)) and all(o.neurons for o in others)

    @property
    def _unsplit(self) -> str | None:
        """Why no split of the model is timed, if so."""
        if (limit := self.shape.placement_limit) is not None:
            return f"this version places nothing of models with {limit}: there are no splits"
        mixed = self.shape.routed and len(self.shape.expert_layers) < len(self.shape.layers)
        return "splits are not timed where dense layers stand beside experts" if mixed else None

    def shares(self) -> list[float]:
        """The hot shares of the splits that are timed: none without torch."""
        if torch_version() is None or self._unsplit is not None:
            return []
        if not self.shape.routed:
            return [_ENDS[0], *HOT_SHARES, _ENDS[1]]
        return [hot / self._count for hot in self.hot_counts()]

    def hot(self, share: float) -> int:
        """Hot experts of a layer, or hot neurons: whole groups, at least one."""
        if self.shape.routed:
            return round(share * self._count)
        neurons = self.shape.layers[0].neurons
        return max(GROUP, int(neurons * share) // GROUP * GROUP) if share else 0

    def hot_counts(self) -> list[int]:
        """Hot experts of each layer, of the splits with a hot side, ascending. Beyond a size, torch's CPU
        device keeps experts as they are and unpacks them for every use; all splits are on one side of it."""
        from powerinfer_tools.engine.hot.assembly import UNPACKED_LIMIT

        layer, count = self.shape.expert_layers[0], self._count
        low, high = (round(share * count) for share in _ENDS)
        low, high = max(1, low), min(count - 1, high)
        values = len(self.shape.layers) * sum(matrix.rows * matrix.columns for matrix in layer.ffn)
        unpacked = min(high, UNPACKED_LIMIT // (4 * values))
        if low <= unpacked < high:
            low, high = max([(low, unpacked), (unpacked + 1, high)], key=lambda ends: ends[1] - ends[0])
        return sorted({round(hot) for hot in np.linspace(low, high, _SPLITS)}) if low < high else []

    def measured(self) -> list[tuple[FFNShape, int]]:
        """The FFNs and experts whose curves are measured, each in as many copies as no cache holds."""
        kinds = dict.fromkeys(kind for layer in self.shape.layers for kind in _kinds(layer))
        layers, width = len(self.shape.layers), self.shape.width
        return [
            (FFNShape(width, neurons, types, expert=expert), _copies(nbytes, None if expert else layers))
            for neurons, types, nbytes, expert in kinds
        ]

    def parts(self, mode: str, hot: int, machine: Machine) -> Parts:
        """The hot side's work counts in neurons, or in bytes of the experts that a token is expected to take
        there."""
        layers = [self._layer(index, mode, hot, machine) for index in range(len(self.shape.layers))]
        work, cold, waits = (sum(part) for part in zip(*layers, strict=True))
        return Parts(work, waits, cold)

    def _layer(self, index: int, mode: str, hot: int, machine: Machine) -> tuple[float, float, float]:
        ffn = self.ffns[index]
        if ffn is None:
            share = float(self.text.choices[index][hot])
            counting = replace(machine, gpu=_COUNTER)
            return mean_seconds(self.shape.layers[index], hot, share, counting)
        return hot, float(mode_seconds(ffn, mode, np.array([hot]), machine)[0]), hot > 0

    def choices(self, hot: int) -> tuple[float | None, float | None]:
        """The share of what routers choose that is hot, by the profile and by the tokens that are timed; None
        without routers."""
        if not self.shape.routed:
            return None, None
        shares = [float(self.text.choices[index][hot]) for index in self._routed]
        return self.expected_choices(hot), sum(shares) / len(shares)

    def expected_choices(self, hot: int) -> float:
        """The share of the routers' choices that the busiest ``hot`` experts have by the profile."""
        frequencies = [self._frequencies[index] for index in self._routed]
        shares = [
            float(shares_of_layer[:hot].sum() / shares_of_layer.sum()) for shares_of_layer in frequencies
        ]
        return sum(shares) / len(shares)

    def notes(self, rows: Sequence[VerifyRow], *, calibrated: bool) -> tuple[str, ...]:
        """What is left out, and how far the tokens are from the profile."""
        if not calibrated:
            if (unsplit := self._unsplit) is not None:
                return (unsplit,)
            few = "there are too few experts for splits with a hot side"
            return (NO_TORCH if torch_version() is None else few,)
        pairs = [(row.predicted_choices, row.measured_choices) for row in rows]
        off = [abs(expected - seen) for expected, seen in pairs if expected is not None and seen is not None]
        if not off:
            return ()
        return (
            "the share of what routers chose that was hot is off by up to "
            f"{100 * max(off):.1f} points, for the tokens that were timed, from what the profile lets expect",
        )

    @property
    def _count(self) -> int:
        """Experts of a layer that a router chooses from."""
        return experts_of(self.shape.expert_layers[0]).count

    @property
    def _routed(self) -> list[int]:
        return [index for index, layer in enumerate(self.shape.layers) if layer.routed]


def _kinds(layer: LayerShape) -> list[tuple[int, tuple[RowType, ...], int, bool]]:
    """Neurons, row types, bytes, and whether it is an expert, of what a layer computes: its FFN, or one of
    its experts and the shared one."""
    if layer.experts is None:
        size, neurons = neuron_bytes(layer), layer.neurons
        return [(neurons, tuple(RowType[name] for name in size.types), neurons * size.total, False)]
    return [
        (
            matrices[0].rows,
            tuple(RowType[matrix.row_type.name] for matrix in matrices),
            sum(matrix.nbytes for matrix in matrices),
            True,
        )
        for matrices in (layer.ffn, layer.experts.shared)
        if matrices
    ]


def _copies(nbytes: int, layers: int | None) -> int:
    """As many as no cache holds, or as the model has."""
    copies = max(2, -(-ENOUGH_BYTES // nbytes))
    return copies if layers is None else min(layers, copies)


def _text(model: Model, profile: Profile) -> Text:
    """Tokens drawn one after the other from what ``model`` predicts, with a fixed seed."""
    routing, layers = model.hyper.routing, model.hyper.layers
    assert routing is not None
    routed = [facts.ffn == "experts" for facts in model.hyper.facts]
    seen = [counters(routing.experts, histogram=False) if has_router else None for has_router in routed]
    random, tokens = np.random.default_rng(_SEED), [model.source.get("tokenizer.ggml.bos_token_id", int, 1)]
    before = [np.zeros(0, np.uint64)] * layers
    engine = Engine(model, context=PROMPT + DECODED, batch=1, observed=seen)
    try:
        for step in range(PROMPT + DECODED):
            if step == PROMPT:
                before = [np.zeros(0, np.uint64) if one is None else one.counts.copy() for one in seen]
            logits = engine.decode(tokens[step]).astype(np.float64)
            chances = np.exp(logits - logits.max())
            tokens.append(int(random.choice(len(chances), p=chances / chances.sum())))
    finally:
        engine.close()
    shares = []
    for index, layer in enumerate(seen):
        taken: npt.NDArray[np.uint64] = np.ones(1, np.uint64)
        if layer is not None:
            taken = (layer.counts - before[index])[order_of(profile, index, routing.experts)]
        shares.append(np.concatenate([[0.0], np.cumsum(taken) / taken.sum()]))
    return Text(tuple(tokens[:-1]), shares)
