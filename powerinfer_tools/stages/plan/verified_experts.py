"""What verifying needs to know of experts: splits by the number of hot ones, and a text.

Time depends on what a text makes the routers choose, and a dozen tokens are no corpus. They are drawn from
the model's own predictions, predicted times count with the share of their choices that is hot, and what the
profile lets expect of that stands beside.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from powerinfer_formats.profile import Profile
from powerinfer_kernels import RowType
from powerinfer_tools.detect import torch_version
from powerinfer_tools.engine import Engine
from powerinfer_tools.engine.observation import counters
from powerinfer_tools.measure.random_ffns import FFNShape
from powerinfer_tools.model.loading import Model
from powerinfer_tools.model.shapes import shape_of_model
from powerinfer_tools.stages.plan.costs import Gpu, Machine
from powerinfer_tools.stages.plan.expert_memory import experts_of
from powerinfer_tools.stages.plan.experts import mean_seconds
from powerinfer_tools.stages.plan.frequencies import model_frequencies
from powerinfer_tools.stages.plan.verification_rows import (
    DECODED,
    ENOUGH_BYTES,
    NO_TORCH,
    PROMPT,
    Parts,
    VerifyRow,
)

#: Splits with a hot side: the first and the last measure torch's CPU device.
_SPLITS = 5
_SHARES = (0.125, 0.875)
_SEED = 1
#: An accelerator that takes a second for each byte: its times are counts.
_COUNTER = Gpu("counter", 1, 1.0, 0.0, 0.0, 1e300, 0.0)


@dataclass(frozen=True)
class Text:
    """Tokens to time, and the share of the routers' choices for them that the first n experts of each layer
    have, busiest first by the profile [layers, experts + 1]."""

    tokens: tuple[int, ...]
    choices: npt.NDArray[np.float64]


class VerifiedExperts:
    """Whole experts; time depends on which ones the tokens take."""

    #: Experts are computed in one way.
    modes = ("dense",)
    #: Passes of a curve in each round: they are short.
    passes = 5

    def __init__(self, model: Model, profile: Profile) -> None:
        self.shape = shape_of_model(model)
        self.layer, self.layers = self.shape.layers[0], len(self.shape.layers)
        self.experts = experts_of(self.layer)
        known = model_frequencies(self.shape, profile).layers
        assert known is not None  # there is a profile
        self._frequencies = known
        self.text = _text(model, profile)

    @property
    def tokens(self) -> Sequence[int]:
        """Drawn from what the model predicts."""
        return self.text.tokens

    def shares(self) -> list[float]:
        """Those of the splits with a hot side."""
        return [hot / self.experts.count for hot in self.hot_counts()]

    def hot(self, share: float) -> int:
        """Hot experts of a layer."""
        return round(share * self.experts.count)

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

    def measured(self) -> list[tuple[FFNShape, int]]:
        """An expert, and the shared one, whose curves are measured, each in as many copies as no cache
        holds."""
        found = []
        for matrices in (self.layer.ffn, self.experts.shared) if self.experts.shared else (self.layer.ffn,):
            types = tuple(RowType[matrix.row_type.name] for matrix in matrices)
            shape = FFNShape(matrices[0].columns, matrices[0].rows, types, expert=True)
            found.append((shape, max(2, -(-ENOUGH_BYTES // sum(matrix.nbytes for matrix in matrices)))))
        return found

    def parts(self, mode: str, hot: int, machine: Machine) -> Parts:
        """The hot side's work counts in bytes of the experts that a token is expected to take there."""
        counting, shares = replace(machine, gpu=_COUNTER), self.text.choices[:, hot]
        layers = [mean_seconds(self.layer, hot, share, counting) for share in shares]
        hot_bytes, cold_seconds, waits = (sum(part) for part in zip(*layers, strict=True))
        return Parts(hot_bytes, waits, cold_seconds)

    def choices(self, hot: int) -> tuple[float, float]:
        """The share of what routers choose that is hot, by the profile and by the tokens that are timed."""
        return self.expected_choices(hot), float(self.text.choices[:, hot].mean())

    def expected_choices(self, hot: int) -> float:
        """The share of the routers' choices that the busiest ``hot`` experts have by the profile."""
        shares = [float(known[:hot].sum() / known.sum()) for known in self._frequencies]
        return sum(shares) / len(shares)

    def notes(self, rows: Sequence[VerifyRow], *, calibrated: bool) -> tuple[str, ...]:
        """What is left out, or how far the tokens are from the profile."""
        if not calibrated:
            few = "there are too few experts for splits with a hot side"
            return (NO_TORCH if torch_version() is None else few,)
        off = max(abs(row.predicted_choices - row.measured_choices) for row in rows)  # type: ignore[operator]
        return (
            "the share of what routers chose that was hot is off by up to "
            f"{100 * off:.1f} points, for the tokens that were timed, from what the profile lets expect",
        )


def _text(model: Model, profile: Profile) -> Text:
    """Tokens drawn one after the other from what ``model`` predicts, with a fixed seed."""
    routing, layers = model.hyper.routing, model.hyper.layers
    assert routing is not None
    seen = [counters(routing.experts, histogram=False) for _ in range(layers)]
    random, tokens = np.random.default_rng(_SEED), [model.source.get("tokenizer.ggml.bos_token_id", int, 1)]
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
