"""Predicted against measured time of a token on this machine's CPU, over splits and modes.

Attention, head and the handling of a token do not depend on the split: they are measured once for all rows.
Predicted are the FFNs, by the cost model that plans are made with, from curves measured in the same run:
neurons by mode, density and number of cold ones, experts by what single ones take. The torch CPU device,
which stands in for an accelerator, computes on the cores that the cold side uses too, so its time is added
and not overlapped: so much for its work, and so much for each layer in which it is waited for. Both come from
two splits of their own, which are no rows. All is measured in turn, again and again, and of each figure the
time counts that a quarter of its samples kept within, since other programs can only slow a machine down.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np

from powerinfer_formats.plan import Plan
from powerinfer_formats.predictors import Predictors
from powerinfer_formats.profile import Profile
from powerinfer_formats.scratch import scratch_folder
from powerinfer_kernels import Pool, read_bandwidth
from powerinfer_tools.errors import PlanError
from powerinfer_tools.measure.ffn_speedup import CURVE_MODES, CurveBench
from powerinfer_tools.model.loading import Model, load_model
from powerinfer_tools.progress import Progress, Silent
from powerinfer_tools.stages.convert.conversion import ConvertOptions, convert
from powerinfer_tools.stages.plan.costs import Machine
from powerinfer_tools.stages.plan.verification_rows import (
    QUANTILE,
    Decoding,
    Parts,
    Verification,
    VerifyRow,
    vram_of,
)
from powerinfer_tools.stages.plan.verified_units import GROUP, VerifiedUnits

_ROUNDS = 4


@dataclass(frozen=True)
class Case:
    """A split, and how it is computed: ``share`` of the units of each layer are hot. Two cases only
    ``calibrate`` the hot side."""

    device: str
    mode: str
    share: float
    calibrates: bool = False


def verify(
    model: Path,
    profile: Path,
    plan: Plan,
    *,
    predictors: Path | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Measure ``model`` in splits and modes, and predict each; ``plan`` is any plan of the model.

    Needs room for a split file in the folder for temporary files, where what a killed run has left goes.
    Raises PlanError for models whose layers differ, and what convert and the engine raise.
    """
    progress = progress or Silent()
    with scratch_folder("verify") as folder:
        source = load_model(model)
        try:
            trained = None if predictors is None else Predictors.load(predictors)
            grid = Grid(verified(source, Profile.load(profile), trained))
        finally:
            source.close()
        split = folder / "all-hot.powerinfer.gguf"
        chosen = folder / "all-hot.plan.json"
        _all_hot(plan).save(chosen)
        convert(ConvertOptions(model, profile, chosen, split, predictors=predictors), progress)
        return grid.run(split, threads, progress)


def verified(model: Model, profile: Profile, predictors: Predictors | None = None) -> VerifiedUnits:
    """The units of ``model``, a source. Raises PlanError for layers that differ."""
    units = VerifiedUnits(model, profile, predictors)
    if not units.alike:
        raise PlanError(f"{model.path}: --verify measures models whose layers are alike")
    return units


def _all_hot(plan: Plan) -> Plan:
    """``plan`` with every unit of the FFNs hot but experts that every token takes, nothing else, and exact
    modes, so that any split is less than planned."""
    layers = tuple(
        replace(
            layer,
            hot_neurons=plan.neurons_of(layer.index),
            mode="dense",
            predictor=None,
            attention="cpu",
            shared_expert=None if layer.shared_expert is None else "cpu",
            # Those of the plan are those of another placement; here they are not counted.
            vram_bytes=0,
            ram_bytes=0,
            disk_bytes=0,
        )
        for layer in plan.layers
    )
    memory = replace(plan.memory, vram_used=0, ram_used=0, disk_used=0)
    group = plan.group if plan.model.experts else min(GROUP, plan.model.neurons)
    return replace(plan, layers=layers, units=(), memory=memory, group=group)


class Grid:
    """The cases to measure of one model, and what they say."""

    def __init__(self, units: VerifiedUnits) -> None:
        self.units = units

    def cases(self) -> list[Case]:
        """All splits to measure: the calibration of the torch CPU device comes first, where that can take a
        part."""
        shares, modes = self.units.shares(), self.units.modes
        on_cpu = [Case("none", mode, 0.0) for mode in modes]
        if not shares:
            return on_cpu
        ends = [Case("cpu", modes[0], share, calibrates=True) for share in (shares[0], shares[-1])]
        return [*ends, *on_cpu, *(Case("cpu", mode, share) for mode in modes for share in shares[1:-1])]

    def run(self, split: Path, threads: int | None, progress: Progress) -> Verification:
        """Measure in rounds, then predict."""
        cases = self.cases()
        samples: dict[Case, list[float]] = {case: [] for case in cases}
        shared, streams = list[float](), list[float]()
        progress.start("measuring", _ROUNDS * len(cases), "splits")
        with Pool(threads) as pool:
            benches = [
                CurveBench(pool, shape, layers, () if shape.expert else CURVE_MODES)
                for shape, layers in self.units.measured()
            ]
            for _ in range(_ROUNDS):
                for bench in benches * self.units.passes:
                    bench.sample()
                streams.append(read_bandwidth(pool, benches[0].nbytes, 0.05))
                for case in cases:
                    vram = partial(vram_of, hot=self.units.hot(case.share))
                    decoding = Decoding(split, case.mode, case.device, vram, self.units.text.tokens)
                    taken, besides = decoding.run(threads)
                    samples[case] += taken
                    shared += besides
                    progress.advance(1)
        progress.finish()
        curves = tuple(bench.curve(QUANTILE) for bench in benches)
        rate = float(np.quantile(streams, 1 - QUANTILE))
        machine = Machine("here", 1, rate, ((1.0, rate),), ffn_curves=curves)
        return self.verification(samples, float(np.quantile(shared, QUANTILE)), machine)

    def verification(self, samples: dict[Case, list[float]], shared: float, machine: Machine) -> Verification:
        """Rows from ``samples`` (seconds of tokens by case), the ``shared`` seconds of a token that are no
        FFN's, and a ``machine`` with curves of the FFNs."""
        measured = {case: float(np.quantile(times, QUANTILE)) for case, times in samples.items()}
        parts = {case: self.parts(case, machine) for case in samples}
        ends = [case for case in samples if case.calibrates]
        left = [measured[case] - shared - parts[case].cold_seconds for case in ends]
        per_work, per_wait = _hot_costs([parts[case] for case in ends], left)
        rows = []
        for case, times in samples.items():
            if case.calibrates:
                continue
            part, hot = parts[case], self.units.hot(case.share)
            expected, counted = self.units.choices(hot)
            rows.append(
                VerifyRow(
                    device=case.device,
                    mode=case.mode,
                    hot_share=case.share,
                    predicted_seconds=shared
                    + part.cold_seconds
                    + per_work * part.hot_work
                    + per_wait * part.waits,
                    measured_seconds=measured[case],
                    spread=median(times) / measured[case] - 1,
                    predicted_choices=expected,
                    measured_choices=counted,
                )
            )
        return Verification(tuple(rows), self.units.notes(rows, calibrated=bool(ends)))

    def parts(self, case: Case, machine: Machine) -> Parts:
        """What the cost model says of a case."""
        return self.units.parts(case.mode, self.units.hot(case.share), machine)


def _hot_costs(parts: list[Parts], left: list[float]) -> tuple[float, float]:
    """Seconds of the hot side's unit of work and of a layer in which it is waited for that explain what is
    ``left`` of two splits; neither is negative."""
    if not parts:
        return 0.0, 0.0
    fewest, most = parts
    both = np.array([[part.hot_work, part.waits] for part in parts])
    per_work, per_wait = (float(cost) for cost in np.linalg.lstsq(both, np.array(left), rcond=None)[0])
    if per_wait < 0:
        return max(0.0, left[1] / most.hot_work), 0.0
    if per_work < 0:
        return 0.0, max(0.0, left[0] / fewest.waits)
    return per_work, per_wait
