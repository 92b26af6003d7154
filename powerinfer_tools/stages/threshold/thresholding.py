"""threshold: for each layer the neurons to leave out, chosen greedily within a budget of perplexity."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from powerinfer_formats.profile import Profile
from powerinfer_formats.thresholds import ThresholdCost, Thresholds, ThresholdsHeader
from powerinfer_tools import __version__
from powerinfer_tools.engine import Engine
from powerinfer_tools.engine.factor_thresholds import FactorThresholds, no_thresholds
from powerinfer_tools.errors import ThresholdError
from powerinfer_tools.model.loading import Model, load_model
from powerinfer_tools.progress import Progress, Silent
from powerinfer_tools.quality.alternating import Alternating
from powerinfer_tools.quality.perplexity import divergence, windows
from powerinfer_tools.stages.threshold.candidates import (
    DENSITIES,
    Candidate,
    Sample,
    best_candidate,
    greedy_path,
)
from powerinfer_tools.stages.threshold.judge import Judge
from powerinfer_tools.text import Tokenizer

Floats = npt.NDArray[np.float32]
#: Bytes that the sampled factors may take.
_SAMPLE_BYTES = 256 << 20
#: Positions of a window whose logits are compared while choosing.
_SCORED = 128
#: Where a layer's price is measured: the density step at which it alone is thinned, and on how many windows.
_PRICED_STEP, _PRICED_WINDOWS = DENSITIES.index(0.5), 2


@dataclass(frozen=True)
class ThresholdOptions:
    """What to choose. ``max_increase`` is the relative increase of perplexity allowed; ``windows`` of
    ``context`` tokens are chosen on, and as many others measured on."""

    model: Path
    profile: Path
    text: str
    output: Path
    max_increase: float
    context: int = 512
    windows: int = 4
    threads: int | None = None


@dataclass(frozen=True)
class ThresholdReport:
    """What was written. ``ffn_share`` is the mean share of FFN bytes that a token still reads."""

    output: str
    header: ThresholdsHeader
    ffn_share: float

    @property
    def density(self) -> float:
        """Mean share of neurons computed."""
        return float(np.mean(self.header.densities))

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        header = vars(self.header) | {"cost": vars(self.header.cost)}
        return {"path": self.output, **header, "density": self.density, "ffn_share": self.ffn_share}


def run_threshold(options: ThresholdOptions, progress: Progress | None = None) -> ThresholdReport:
    """Choose thresholds and write them. Raises ThresholdError, ModelError, CorpusError and FormatError."""
    model = load_model(options.model)
    try:
        profile = Profile.load(options.profile)
        _check(options, model, profile)
        thresholds = no_thresholds(model.hyper.layers, model.hyper.neurons)
        engine = Engine(model, threads=options.threads, context=options.context, thresholds=thresholds)
        with engine:
            return _Choice(options, model, profile, engine, thresholds, progress or Silent()).complete()
    finally:
        model.close()


def _check(options: ThresholdOptions, model: Model, profile: Profile) -> None:
    if model.is_split:
        raise ThresholdError(f"{options.model} is a split file; choose thresholds for its source model")
    model.require_one_ffn(ThresholdError, "threshold")
    if model.exact_zeros:
        raise ThresholdError(
            f"{options.model}: {model.hyper.activation} has exact zeros, which mode gate-first skips without "
            "any loss; thresholds are for SiLU and GELU"
        )
    if not model.spec.gated:
        raise ThresholdError(
            f"{options.model}: thresholds compare one factor of act(gate)·up, and its FFN has no gate"
        )
    if profile.fingerprint != model.fingerprint:
        raise ThresholdError(
            f"{options.profile} was made for {profile.model_name!r}, not for {model.name!r} "
            f"({options.model}); make its own with powerinfer profile"
        )
    if not 0 < options.max_increase <= 1:
        raise ThresholdError(
            f"--max-ppl-increase {options.max_increase:g}: expected a share above 0, such as 1%, up to 100%"
        )


class _Choice:
    """One run of threshold."""

    def __init__(
        self,
        options: ThresholdOptions,
        model: Model,
        profile: Profile,
        engine: Engine,
        thresholds: Sequence[FactorThresholds],
        progress: Progress,
    ) -> None:
        self.options, self.model, self.profile, self.progress = options, model, profile, progress
        self.engine, self.thresholds = engine, thresholds
        # What measures the result, at the end of all work, has its memory from the start.
        self.dense = engine.weights.session()
        self.chosen_on, self.measured_on = self._windows()
        self.samples = self._sample()
        self.candidates = [best_candidate(sample) for sample in self.samples]

    def complete(self) -> ThresholdReport:
        """Price every layer, walk the greedy path as far as the budget goes, and measure the result."""
        judge = Judge(self.engine, self.chosen_on, _SCORED)
        path = greedy_path([one.lost for one in self.candidates], self._prices(judge))
        layers = len(self.candidates)
        self.progress.start("searching", None, "evaluations")
        even = self._furthest(
            judge, [[(layer, step) for layer in range(layers)] for step in range(len(DENSITIES))]
        )
        steps = self._furthest(judge, [path[:count] for count in range(len(path) + 1)])
        self.progress.finish()
        self._apply(steps)
        header = self._header(steps, even)
        factors = zip(header.factors, self.thresholds, strict=True)
        kept = tuple(
            None if factor == "none" else getattr(thresholds, factor).copy() for factor, thresholds in factors
        )
        self.model.source.require_unchanged()
        Thresholds(header, kept).save(self.options.output)
        return ThresholdReport(str(self.options.output), header, self._ffn_share(header.densities))

    def _windows(self) -> tuple[list[list[int]], list[list[int]]]:
        """Windows to choose on and to measure on, taking turns over the whole text."""
        tokenizer = Tokenizer.from_gguf(self.model.source)
        bos = tokenizer.bos_id if tokenizer.adds_bos else None
        every = windows(tokenizer.encode(self.options.text), self.options.context, None, bos)
        count = 2 * self.options.windows
        if len(every) < count:
            raise ThresholdError(
                f"the text has {len(every)} windows of {self.options.context} tokens, and {count} are "
                "needed: half to choose on, half to measure on; give more text, or a smaller --windows"
            )
        some = [every[i * len(every) // count] for i in range(count)]
        return some[::2], some[1::2]

    def _sample(self) -> list[Sample]:
        """Factors of random tokens of the windows that are chosen on."""
        hyper, count = self.model.hyper, len(self.chosen_on)
        affordable = _SAMPLE_BYTES // (8 * hyper.neurons * hyper.layers * count)
        rows = max(1, min(self.options.context, affordable, 64))
        rng = np.random.default_rng(0)
        gates: list[list[Floats]] = [[] for _ in range(hyper.layers)]
        ups: list[list[Floats]] = [[] for _ in range(hyper.layers)]
        self.progress.start("reading", count, "windows")
        for window in self.chosen_on:
            chosen = np.sort(rng.permutation(len(window))[:rows])

            def look(layer: int, _: Floats, __: Floats, chosen: npt.NDArray[np.int64] = chosen) -> None:
                gate, up = self.engine.stack.known_factors(self.options.context)
                gates[layer].append(gate[chosen])
                ups[layer].append(up[chosen])

            self.engine.absorb(window, look)
            self.progress.advance(1)
        self.progress.finish()
        return [
            Sample(
                np.concatenate(gates[layer]),
                np.concatenate(ups[layer]),
                {"gate": self.profile.up_rms(layer), "up": self.profile.gate_rms(layer)},
            )
            for layer in range(hyper.layers)
        ]

    def _prices(self, judge: Judge) -> list[float]:
        """What a unit of lost contribution costs in ln perplexity, layer by layer."""
        prices = []
        self.progress.start("pricing", len(self.candidates), "layers")
        for layer, one in enumerate(self.candidates):
            self._apply([(layer, _PRICED_STEP)])
            cost = math.log1p(judge.increase(_PRICED_WINDOWS))
            prices.append(cost / max(one.lost[_PRICED_STEP], 1e-12))
            self.progress.advance(1)
        self.progress.finish()
        return prices

    def _furthest(self, judge: Judge, ways: Sequence[list[tuple[int, int]]]) -> list[tuple[int, int]]:
        """The last of ``ways`` within the budget, by bisection: each leaves out more than the one before. The
        first leaves out nothing."""
        within, beyond = 0, len(ways)
        while beyond - within > 1:
            middle = (within + beyond) // 2
            self._apply(ways[middle])
            self.progress.advance(1)
            if judge.increase() <= self.options.max_increase:
                within = middle
            else:
                beyond = middle
        return ways[within]

    def _apply(self, steps: Sequence[tuple[int, int]]) -> None:
        """Set the thresholds of all layers: those of the last step of each."""
        for thresholds in self.thresholds:
            thresholds.clear()
        for layer, step in dict(steps).items():
            one: Candidate = self.candidates[layer]
            values = one.thresholds(step, self.samples[layer])
            getattr(self.thresholds[layer], one.factors[step])[:] = values

    def _header(self, steps: Sequence[tuple[int, int]], even: Sequence[tuple[int, int]]) -> ThresholdsHeader:
        reached = dict(steps)
        layers = range(self.model.hyper.layers)
        return ThresholdsHeader(
            fingerprint=self.model.fingerprint,
            model_name=self.model.name,
            activation=self.model.hyper.activation,
            neurons=self.model.hyper.neurons,
            max_increase=self.options.max_increase,
            factors=tuple(
                self.candidates[layer].factors[reached[layer]] if layer in reached else "none"
                for layer in layers
            ),
            densities=tuple(DENSITIES[reached.get(layer, 0)] for layer in layers),
            uniform_density=DENSITIES[dict(even).get(0, 0)],
            cost=self._cost(),
            text_sha256=hashlib.sha256(self.options.text.encode()).hexdigest(),
            tool_version=__version__,
        )

    def _cost(self) -> ThresholdCost:
        """Measured on the windows that nothing was chosen on."""
        chosen = [(layer.gate.copy(), layer.up.copy()) for layer in self.thresholds]

        def thin() -> None:
            for layer, (gate, up) in zip(self.thresholds, chosen, strict=True):
                layer.gate[:], layer.up[:] = gate, up

        def dense() -> None:
            for layer in self.thresholds:
                layer.clear()

        ways = (
            Alternating(self.engine, self.engine.session, thin),
            Alternating(self.engine, self.dense, dense),
        )
        cost = divergence(*ways, self.measured_on, self.progress)
        thin()
        return ThresholdCost(
            dense_perplexity=cost.base_perplexity,
            perplexity=cost.perplexity,
            ratio_error=cost.ratio_error,
            kl=cost.mean_kl,
            tokens=cost.positions,
        )

    def _ffn_share(self, densities: Sequence[float]) -> float:
        """Known rows are read whole; of a third of the bytes if all three rows are alike."""
        return float(np.mean([(1 + 2 * density) / 3 if density < 1 else 1.0 for density in densities]))
