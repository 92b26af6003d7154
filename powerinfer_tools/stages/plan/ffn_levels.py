"""The ways in which one FFN can be computed, each for every hot count: seconds and extra bytes of both sides.

Dense and gate-first take the same bytes, so the faster one stands for both. A predictor takes bytes of its
own, where it lives: beside the cold neurons on the CPU, which then predicts for them alone while the
accelerator works; or on the accelerator, which then predicts for all neurons before either side begins. With
thresholds, the CPU leaves out what is small of the cold neurons; hot ones are computed whole.
"""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from powerinfer_formats.block_types import BLOCK_SHAPES
from powerinfer_formats.modes import MODES
from powerinfer_tools.model.matrices import FLOAT_TYPES
from powerinfer_tools.model.predictor_shapes import PredictorShape, predicted_frequencies
from powerinfer_tools.model.shapes import LayerShape, NeuronBytes
from powerinfer_tools.stages.plan import costs
from powerinfer_tools.stages.plan.costs import Machine
from powerinfer_tools.stages.plan.thresholded_shapes import ThresholdShape

Vector = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
_PREDICTED, _THRESHOLDED = MODES.index("predicted"), MODES.index("thresholded")


@dataclass(frozen=True)
class FFN:
    """One FFN: ``skips``: inactive neurons contribute nothing and it is known how often each is active,
    ``frequencies`` [neurons], descending (all 1 where nothing is known). ``columns``: nothing may be hot, so
    that a split file keeps the source's down projection where the layer is dense."""

    layer: LayerShape
    sizes: NeuronBytes
    frequencies: Vector
    skips: bool
    predictor: PredictorShape | None
    threshold: ThresholdShape | None = None
    columns: bool = False


@dataclass(frozen=True)
class FFNWay:
    """One way; arrays are [hot counts], and ``hot`` has those. ``mode``: index into MODES.
    ``predictor_seconds`` is a part of ``cold_seconds``, or, with ``predictor_hot``, passes before both sides
    begin. ``vram`` and ``ram``: bytes of the predictor on each side, scratch included. ``shared_hot`` and
    ``uneven_seconds`` and ``padding`` (None: 0) as in a
    :class:`~powerinfer_tools.stages.plan.levels.LevelTable`."""

    hot: Integers
    mode: Integers
    predictor_hot: bool
    predictor_seconds: Vector
    hot_seconds: Vector
    cold_seconds: Vector
    vram: Integers
    ram: Integers
    shared_hot: Integers | None = None
    uneven_seconds: Vector | None = None
    padding: Integers | None = None


def ffn_ways(
    ffn: FFN, hot: Integers, machine: Machine, batch: int, *, sparse_hot: bool, predictors_move: bool
) -> list[FFNWay]:
    """All ways to compute ``ffn`` with ``hot`` [hot counts] neurons on the accelerator; the first is
    exact."""
    exact = _exact(ffn, hot, machine, sparse_hot=sparse_hot)
    if ffn.threshold is not None and not ffn.skips:
        return [exact, _thresholded(ffn, exact, hot, machine)]
    if ffn.predictor is None or not ffn.skips:
        return [exact]
    ways = [exact, _predicted_on_cpu(ffn, ffn.predictor, exact, hot, machine, batch)]
    some = hot[hot > 0]
    if machine.gpu is not None and predictors_move and len(some):
        # Without hot neurons the engine leaves the predictor on the CPU.
        exact = _exact(ffn, some, machine, sparse_hot=sparse_hot)
        ways.append(_predicted_on_gpu(ffn, ffn.predictor, exact, some, machine, batch, sparse_hot=sparse_hot))
    return ways


def mode_seconds(ffn: FFN, mode: str, hot: Integers, machine: Machine) -> Vector:
    """Seconds of the CPU for the cold neurons of ``ffn`` computed in ``mode`` [hot counts]."""
    sizes, curve = ffn.sizes, machine.ffn_curve(ffn.layer.width, ffn.sizes.types, ffn.layer.neurons)
    cold, density = _cold(ffn.frequencies, hot)
    if mode == "dense":
        return _dense(ffn, cold, density, machine)
    if mode == "gate-first":
        return costs.gate_first_seconds(cold * sizes.always, cold * sizes.skippable, density, machine, curve)
    if mode == "thresholded":
        assert ffn.threshold is not None
        always = ffn.threshold.always_bytes(sizes, ffn.layer.width)
        share = np.full(len(hot), ffn.threshold.density)
        return costs.gate_first_seconds(cold * always, cold * (sizes.total - always), share, machine, curve)
    assert ffn.predictor is not None
    stream = costs.dense_stream_seconds(
        ffn.predictor.nbytes(ffn.layer.neurons - hot).astype(np.float64), machine
    )
    return stream + _predicted_rows(ffn, ffn.predictor, hot, machine)


def _dense(ffn: FFN, cold: Vector, density: Vector, machine: Machine) -> Vector:
    """All gate and up rows; the sum of down rows leaves out zeros by itself, so this is gate-first with up
    rows among those that always count. Without a gate the two are one. Where nothing may be hot, a split
    file has the down projection as the source has it: that form counts, which no plan may be slower than."""
    sizes, curve = ffn.sizes, machine.ffn_curve(ffn.layer.width, ffn.sizes.types, ffn.layer.neurons)
    if not ffn.skips:
        rows = costs.dense_seconds(cold * sizes.total, machine, curve)
    else:
        first = cold * (sizes.total - sizes.down)
        rows = costs.gate_first_seconds(first, cold * sizes.down, density, machine, curve)
    if not (ffn.columns and keeps_columns(ffn.layer)):
        return rows
    nbytes = float(sum(matrix.nbytes for matrix in ffn.layer.ffn))
    return np.full(len(cold), costs.columns_seconds(nbytes, machine, curve))


def keeps_columns(layer: LayerShape) -> bool:
    """Whether a split file keeps the source's down projection where ``layer`` is dense: where the rows of
    neurons had to be quantised again."""
    down = layer.down
    if layer.experts is not None or layer.down_transposed or down.row_type in FLOAT_TYPES:
        return False
    return down.columns % BLOCK_SHAPES[down.row_type].values == 0


def expected(frequencies: Vector) -> Vector:
    """Expected active neurons among the first k, k = 0 … neurons."""
    return np.concatenate([np.zeros(1), np.cumsum(frequencies)])


def _exact(ffn: FFN, hot: Integers, machine: Machine, *, sparse_hot: bool) -> FFNWay:
    """The faster of dense and gate-first on the cold side."""
    sizes = ffn.sizes
    dense = mode_seconds(ffn, "dense", hot, machine)
    first = mode_seconds(ffn, "gate-first", hot, machine) if ffn.skips else dense
    active = expected(ffn.frequencies)[hot] if ffn.skips and sparse_hot else hot.astype(np.float64)
    none = np.zeros(len(hot), dtype=np.int64)
    return FFNWay(
        hot=hot,
        mode=((first <= dense) & ffn.skips).astype(np.int64),
        predictor_hot=False,
        predictor_seconds=np.zeros(len(hot)),
        hot_seconds=_hot_seconds(hot, hot * float(sizes.always) + active * sizes.skippable, machine),
        cold_seconds=np.minimum(dense, first),
        vram=none,
        ram=none,
    )


def _thresholded(ffn: FFN, exact: FFNWay, hot: Integers, machine: Machine) -> FFNWay:
    """The CPU leaves out cold neurons with a small factor; the accelerator computes as in ``exact``."""
    return replace(
        exact,
        mode=np.full(len(hot), _THRESHOLDED),
        cold_seconds=mode_seconds(ffn, "thresholded", hot, machine),
    )


def _predicted_on_cpu(
    ffn: FFN, predictor: PredictorShape, exact: FFNWay, hot: Integers, machine: Machine, batch: int
) -> FFNWay:
    """The CPU predicts for the cold neurons; the accelerator computes as in ``exact``."""
    cold = ffn.layer.neurons - hot
    nbytes = predictor.nbytes(cold)
    seconds = costs.dense_stream_seconds(nbytes.astype(np.float64), machine)
    return FFNWay(
        hot=hot,
        mode=np.full(len(hot), _PREDICTED),
        predictor_hot=False,
        predictor_seconds=seconds,
        hot_seconds=exact.hot_seconds,
        cold_seconds=mode_seconds(ffn, "predicted", hot, machine),
        vram=np.zeros(len(hot), dtype=np.int64),
        ram=nbytes + (cold > 0) * batch * predictor.token_bytes,
    )


def _predicted_on_gpu(
    ffn: FFN,
    predictor: PredictorShape,
    exact: FFNWay,
    hot: Integers,
    machine: Machine,
    batch: int,
    *,
    sparse_hot: bool,
) -> FFNWay:
    """The accelerator predicts for all neurons; with ``sparse_hot`` it computes predicted ones only."""
    gpu = machine.gpu
    assert gpu is not None
    nbytes = int(predictor.nbytes(np.array([ffn.layer.neurons]))[0])
    seconds = nbytes / gpu.bandwidth + costs.PREDICTOR_LAUNCHES * gpu.launch_seconds
    hot_seconds = exact.hot_seconds
    if sparse_hot:
        named = expected(predicted_frequencies(ffn.frequencies, predictor.overshoot))[hot]
        hot_seconds = _hot_seconds(hot, named * ffn.sizes.total, machine)
    return FFNWay(
        hot=hot,
        mode=np.full(len(hot), _PREDICTED),
        predictor_hot=True,
        predictor_seconds=np.full(len(hot), seconds),
        hot_seconds=hot_seconds,
        cold_seconds=_predicted_rows(ffn, predictor, hot, machine),
        vram=np.full(len(hot), nbytes + batch * predictor.token_bytes),
        ram=np.zeros(len(hot), dtype=np.int64),
    )


def _predicted_rows(ffn: FFN, predictor: PredictorShape, hot: Integers, machine: Machine) -> Vector:
    """Seconds of the CPU for the rows of cold neurons that are predicted: the gate rows of all that are
    named, the other rows of those whose gates confirm it."""
    sizes, curve = ffn.sizes, machine.ffn_curve(ffn.layer.width, ffn.sizes.types, ffn.layer.neurons)
    cold, named = _cold(predicted_frequencies(ffn.frequencies, predictor.overshoot), hot)
    _, active = _cold(ffn.frequencies, hot)
    read = sizes.always * named + sizes.skippable * np.minimum(active, named)
    return costs.predicted_seconds(cold * sizes.total, read / sizes.total, machine, curve)


def _cold(frequencies: Vector, hot: Integers) -> tuple[Vector, Vector]:
    """Cold neurons and their mean frequency, [hot counts]."""
    active = expected(frequencies)
    cold = (len(frequencies) - hot).astype(np.float64)
    return cold, np.clip((active[-1] - active[hot]) / np.maximum(cold, 1.0), 0.0, 1.0)


def _hot_seconds(hot: Integers, nbytes: Vector, machine: Machine) -> Vector:
    if machine.gpu is None:
        return np.zeros(len(hot))
    return nbytes / machine.gpu.bandwidth + costs.FFN_LAUNCHES * machine.gpu.launch_seconds * (hot > 0)
