"""Predicted against measured time of a token on this machine's CPU, over splits and modes.

Attention, head and the handling of a token do not depend on the split: they are measured once for all rows.
Predicted are the FFNs: their time by mode, density and number of cold neurons, from a curve measured in the
same run, by the cost model that plans are made with. The torch CPU device, which stands in for an
accelerator, computes on the cores that the cold side uses too, so its time is added and not overlapped; what
it takes per layer and per neuron comes from two splits of their own, which are no rows. All is measured in
turn, again and again, and of each figure the time counts that a quarter of its samples kept within, since
other programs can only slow a machine down.
"""

import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np

from powerinfer_formats.plan import Plan
from powerinfer_formats.predictors import Predictors
from powerinfer_formats.profile import Profile
from powerinfer_kernels import Pool, RowType, read_bandwidth
from powerinfer_tools.detect import torch_version
from powerinfer_tools.errors import PlanError
from powerinfer_tools.measure.ffn_speedup import CurveBench
from powerinfer_tools.measure.random_ffns import FFNShape
from powerinfer_tools.model.loading import Model, load_model
from powerinfer_tools.model.shapes import neuron_bytes, shape_of_model
from powerinfer_tools.progress import Progress, Silent
from powerinfer_tools.stages.convert.conversion import ConvertOptions, convert
from powerinfer_tools.stages.plan.costs import Machine
from powerinfer_tools.stages.plan.expert_verification import ExpertGrid, without_shared
from powerinfer_tools.stages.plan.ffn_levels import FFN, mode_seconds
from powerinfer_tools.stages.plan.frequencies import model_frequencies
from powerinfer_tools.stages.plan.offer import predictor_shapes
from powerinfer_tools.stages.plan.verification_rows import (
    QUANTILE,
    Decoding,
    Verification,
    VerifyRow,
    vram_of,
)

#: Hot shares of the rows, and of the two splits that the torch CPU device is measured with.
HOT_SHARES = (0.25, 0.5, 0.75)
_CALIBRATION = (0.125, 0.875)
_ROUNDS = 4
_GROUP = 32
#: Bytes of FFNs beyond which no cache holds a model: more of them measure nothing new.
_ENOUGH = 640 << 20


@dataclass(frozen=True)
class _Case:
    device: str
    mode: str
    share: float


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

    Needs room for a split file in the folder for temporary files. Raises PlanError for models whose layers
    differ, and what convert and the engine raise.
    """
    progress = progress or Silent()
    with tempfile.TemporaryDirectory(prefix="powerinfer-verify-") as folder:
        source = load_model(model)
        try:
            routed = source.hyper.routing is not None
            grid: _Grid | ExpertGrid
            if routed:
                grid = ExpertGrid(source, Profile.load(profile))
            else:
                known = None if predictors is None else Predictors.load(predictors)
                grid = _Grid(source, Profile.load(profile), known)
        finally:
            source.close()
        split = Path(folder) / "all-hot.powerinfer.gguf"
        chosen = Path(folder) / "all-hot.plan.json"
        (without_shared(plan) if routed else _all_hot(plan)).save(chosen)
        convert(ConvertOptions(model, profile, chosen, split, predictors=predictors), progress)
        return grid.run(split, threads, progress)


def _all_hot(plan: Plan) -> Plan:
    """``plan`` with every neuron hot, nothing else, and exact modes, so that any split is less than
    planned."""
    hot = plan.model.neurons
    # The bytes of the plan are those of another placement; here they are not counted.
    dense = {"mode": "dense", "predictor": None, "attention": "cpu", "vram_bytes": 0, "ram_bytes": 0}
    layers = tuple(replace(layer, hot_neurons=hot, **dense) for layer in plan.layers)  # type: ignore[arg-type]
    memory = replace(plan.memory, vram_used=0, ram_used=0)
    return replace(plan, layers=layers, units=(), memory=memory, group=min(_GROUP, hot))


class _Grid:
    """What is known of the model, and the cases to measure."""

    def __init__(self, model: Model, profile: Profile, predictors: Predictors | None) -> None:
        self.shape = shape_of_model(model)
        self.layers = len(self.shape.layers)
        self.sizes = [neuron_bytes(layer) for layer in self.shape.layers]
        if len(set(self.shape.layers)) > 1:
            raise PlanError(f"{model.path}: --verify measures models whose layers are alike")
        known = model_frequencies(self.shape, profile).layers
        assert known is not None  # there is a profile
        shapes = predictor_shapes(predictors) if predictors else (None,) * self.layers
        self.ffns = [
            FFN(layer, size, frequencies, self.shape.exact_zeros, shape)
            for layer, size, frequencies, shape in zip(
                self.shape.layers, self.sizes, known, shapes, strict=True
            )
        ]
        self.modes = ["dense"]
        if self.shape.exact_zeros:
            self.modes += ["gate-first", *(["predicted"] if all(shapes) else [])]

    def cases(self) -> list[_Case]:
        """All splits to measure: the calibration of the torch CPU device comes first, where torch is
        there."""
        on_cpu = [_Case("none", mode, 0.0) for mode in self.modes]
        if torch_version() is None:
            return on_cpu
        beside = [_Case("cpu", mode, share) for mode in self.modes for share in HOT_SHARES]
        return [*(_Case("cpu", "dense", share) for share in _CALIBRATION), *on_cpu, *beside]

    def run(self, split: Path, threads: int | None, progress: Progress) -> Verification:
        """Measure in rounds, then predict."""
        cases = self.cases()
        samples: dict[_Case, list[float]] = {case: [] for case in cases}
        shared: list[float] = []
        streams: list[float] = []
        types = tuple(RowType[name] for name in self.sizes[0].types)
        first = self.shape.layers[0]
        nbytes = first.neurons * self.sizes[0].total
        layers = min(self.layers, max(2, -(-_ENOUGH // nbytes)))
        progress.start("measuring", _ROUNDS * len(cases), "splits")
        with Pool(threads) as pool:
            bench = CurveBench(pool, FFNShape(first.width, first.neurons, types), layers)
            for _ in range(_ROUNDS):
                bench.sample()
                streams.append(read_bandwidth(pool, layers * nbytes, 0.05))
                for case in cases:
                    vram = partial(_vram, share=case.share)
                    taken, besides = Decoding(split, case.mode, case.device, vram).run(threads)
                    samples[case] += taken
                    shared += besides
                    progress.advance(1)
        progress.finish()
        rate = float(np.quantile(streams, 1 - QUANTILE))
        machine = Machine("here", 1, rate, ((1.0, rate),), ffn_curves=(bench.curve(QUANTILE),))
        return self._verification(samples, float(np.quantile(shared, QUANTILE)), machine)

    def _verification(
        self, samples: dict[_Case, list[float]], shared: float, machine: Machine
    ) -> Verification:
        measured = {case: float(np.quantile(times, QUANTILE)) for case, times in samples.items()}
        per_neuron, per_layer = 0.0, 0.0
        calibration = [case for case in samples if case.share in _CALIBRATION]
        if calibration:
            hot = [self._hot(case.share) * self.layers for case in calibration]
            left = [measured[case] - shared - self._cold(case, machine) for case in calibration]
            per_neuron = max(0.0, (left[1] - left[0]) / (hot[1] - hot[0]))
            per_layer = max(0.0, left[0] - per_neuron * hot[0]) / self.layers
        rows = []
        for case, times in samples.items():
            if case in calibration:
                continue
            beside = self.layers * (per_layer + per_neuron * self._hot(case.share)) if case.share else 0.0
            predicted = shared + self._cold(case, machine) + beside
            spread = median(times) / measured[case] - 1
            rows.append(VerifyRow(case.device, case.mode, case.share, predicted, measured[case], spread))
        notes = () if calibration else ("torch is not installed: splits with a hot side are left out",)
        return Verification(tuple(rows), notes)

    def _hot(self, share: float) -> int:
        return _hot_neurons(self.shape.layers[0].neurons, share)

    def _cold(self, case: _Case, machine: Machine) -> float:
        """Seconds of all cold sides."""
        hot = np.array([self._hot(case.share)])
        return sum(float(mode_seconds(ffn, case.mode, hot, machine)[0]) for ffn in self.ffns)


def _hot_neurons(neurons: int, share: float) -> int:
    """Hot neurons of a layer: whole groups, at least one."""
    return max(_GROUP, int(neurons * share) // _GROUP * _GROUP) if share else 0


def _vram(model: Model, share: float) -> int:
    """The budget with which the engine places exactly the hot neurons of ``share`` in every layer."""
    return vram_of(model, _hot_neurons(model.hyper.neurons, share))
