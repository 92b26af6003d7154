"""No mode that a plan chooses is slower than the source's dense form on that machine: the curve decides."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plan_cases import NEURONS_ONLY, granted, machine, shape, skewed_frequencies
from powerinfer_formats.block_types import TensorType
from powerinfer_formats.hardware import FFNCurve
from powerinfer_formats.modes import MODES
from powerinfer_tools.model.matrices import MatrixShape
from powerinfer_tools.model.predictor_shapes import PredictorShape
from powerinfer_tools.model.shapes import ModelShape, neuron_bytes
from powerinfer_tools.stages.plan.costs import Machine
from powerinfer_tools.stages.plan.ffn_levels import keeps_columns
from powerinfer_tools.stages.plan.frequencies import Frequencies
from powerinfer_tools.stages.plan.levels import Inputs, LevelOptions, LevelTable, layer_levels, neuron_ways
from powerinfer_tools.stages.plan.memory import Workload
from powerinfer_tools.stages.plan.milp import SolverOptions
from powerinfer_tools.stages.plan.planner import PlanOptions, plan_outcome

RATE = st.floats(1e8, 1e11)
DENSITIES = (0.05, 0.3, 1.0)


def curve(columns: float, rows: float, first: float, predicted: float) -> FFNCurve:
    """A made-up curve of the small shape, the same rate at every density."""
    rates = ((first,) * 3, (predicted,) * 3)
    return FFNCurve(256, 512, "Q4_1", "Q4_1", "Q8_0", rows, DENSITIES, *rates, columns_bytes_per_s=columns)


def levels(model: ModelShape, on: Machine, predictor: PredictorShape | None = None) -> LevelTable:
    """The levels of its first layer."""
    count = len(model.layers)
    frequencies = skewed_frequencies(count, 512)
    sizes = tuple(neuron_bytes(layer) for layer in model.layers)
    predictors = () if predictor is None else (predictor,) * count
    inputs = Inputs(model, on, Workload(1024, 512), frequencies, sizes, predictors)
    return layer_levels(0, inputs, LevelOptions(64, NEURONS_ONLY), neuron_ways)


def source_seconds(model: ModelShape, rate: float) -> float:
    """One FFN in the source's form."""
    return sum(matrix.nbytes for matrix in model.layers[0].ffn) / rate


def on_curve(measured: FFNCurve, vram: int | None = None) -> Machine:
    """The machine of the other tests with this curve."""
    return replace(machine(vram=vram), ffn_curves=(measured,))


@given(columns=RATE, rows=RATE, first=RATE, predicted=RATE, activation=st.sampled_from(["relu", "silu"]))
def test_the_fastest_level_is_never_slower_than_the_source(
    columns: float, rows: float, first: float, predicted: float, activation: str
) -> None:
    model = shape(1, 512, activation=activation)
    predictor = PredictorShape(0, 40, 0, 1.5)
    table = levels(model, on_curve(curve(columns, rows, first, predicted)), predictor)
    fastest = table.seconds.min() - table.block_seconds[0]
    assert fastest <= source_seconds(model, columns) * (1 + 1e-9)


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize(("bandwidth", "is_hot"), [(1e8, False), (1e12, True)])
def test_an_accelerator_that_does_not_help_leaves_the_source(
    bandwidth: float, is_hot: bool, activation: str
) -> None:
    model = shape(2, 512, activation=activation)
    on = on_curve(curve(2e10, 1e9, 1e9, 1e9), 1 << 32)
    assert on.gpu is not None
    on = replace(on, gpu=replace(on.gpu, bandwidth=bandwidth))
    frequencies = Frequencies(skewed_frequencies(2, 512), "made up")
    options = PlanOptions(solver=SolverOptions(gap=0.0), context=1024, engine=NEURONS_ONLY)
    placement = plan_outcome(model, frequencies, on, granted(1 << 30), options).placement
    chosen = list(zip(placement.tables[:-1], placement.solution.choice, strict=False))
    assert any(table.hot[k] for table, k in chosen) == is_hot
    source = 2 * source_seconds(model, 2e10)
    took = sum(float(table.seconds[k] - table.block_seconds[k]) for table, k in chosen)
    assert took <= source * (1 + 1e-9)


@pytest.mark.parametrize(("first", "mode"), [(1e8, "dense"), (1e11, "gate-first")])
def test_the_curve_decides(first: float, mode: str) -> None:
    model = shape(1, 512, activation="relu")
    table = levels(model, on_curve(curve(2e10, 2e10, first, 1e8)))
    assert MODES[table.mode[0]] == mode
    dense = source_seconds(model, 2e10)
    if mode == "dense":
        assert table.cold_seconds[0] == pytest.approx(dense, rel=1e-12)
    else:
        assert table.cold_seconds[0] < dense


def test_slow_rows_do_not_count_where_the_source_has_columns() -> None:
    model = shape(1, 512, activation="silu")
    table = levels(model, on_curve(curve(2e10, 1e9, 1e9, 1e9)))
    assert table.cold_seconds[0] == pytest.approx(source_seconds(model, 2e10), rel=1e-12)


def test_a_profile_that_did_not_measure_columns_counts_their_bytes_at_the_rate_of_rows() -> None:
    model = shape(1, 512, activation="silu")
    table = levels(model, on_curve(curve(0.0, 5e9, 1e9, 1e9)))
    assert table.cold_seconds[0] == pytest.approx(source_seconds(model, 5e9), rel=1e-12)


def test_float_and_transposed_projections_stay_rows() -> None:
    layer = shape(1, 512).layers[0]
    assert keeps_columns(layer)
    assert not keeps_columns(replace(layer, down_transposed=True))
    assert not keeps_columns(replace(layer, down=MatrixShape(TensorType.F16, 256, 512)))
