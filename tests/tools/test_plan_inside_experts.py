"""Zeros inside experts in plans: what the CPU takes for an expert whose zeros it leaves out, which form is
chosen, and that a split file of such a plan has the source's bits in the mode that the plan chose."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine_logits import logits
from hybrid_profiles import TOKENS, profile_of
from plan_cases import NEURONS_ONLY, expert_shape, granted, machine, routing_frequencies
from powerinfer_formats.hardware import FFNCurve
from powerinfer_formats.plan import Plan
from powerinfer_formats.profile import Profile
from powerinfer_formats.split import SplitFile
from powerinfer_kernels import Layout, Matrix, Pool, RowType, packed_row_bytes, row_bytes
from powerinfer_tools.engine import Engine, from_disk
from powerinfer_tools.engine import weights as weights_module
from powerinfer_tools.engine.from_disk import FromDisk
from powerinfer_tools.engine.residency import Residency
from powerinfer_tools.engine.weights_on_disk import Budget
from powerinfer_tools.errors import ModelError
from powerinfer_tools.inspect.describe import describe
from powerinfer_tools.measure.hardware.presets import PC_LOW
from powerinfer_tools.measure.synthetic.models import write_synthetic
from powerinfer_tools.measure.synthetic.shapes import Shape
from powerinfer_tools.model.loading import load_model
from powerinfer_tools.model.matrices import MatrixShape
from powerinfer_tools.model.shapes import LayerShape, ModelShape, shape_of_model
from powerinfer_tools.stages.convert.conversion import ConvertOptions, convert
from powerinfer_tools.stages.plan import memory
from powerinfer_tools.stages.plan.costs import Disk, Machine
from powerinfer_tools.stages.plan.frequencies import Frequencies, model_frequencies
from powerinfer_tools.stages.plan.milp import SolverOptions
from powerinfer_tools.stages.plan.planner import Outcome, PlanOptions, plan_outcome
from powerinfer_tools.stages.plan.report import render_plan
from powerinfer_tools.stages.plan.request import make_plan

# Q4_1: 20 bytes for 32 values; experts of 128 neurons and 256 columns.
GATE, UP, DOWN, SCALES = 128 * 160, 128 * 160, 256 * 80, 256 * 16
#: Up rows of 160 bytes fill three lines; a column's codes fill one.
PADDING = 128 * (192 - 160)


def planned(model: ModelShape, inside: float | None, on: Machine | None = None, **options: object) -> Outcome:
    """Of experts whose busiest has a share ``inside`` of its neurons active, and the others ever less."""
    chosen = PlanOptions(solver=SolverOptions(gap=0.0), context=64, batch=16, engine=NEURONS_ONLY)
    shares = None if inside is None else inside * np.linspace(1.0, 0.5, 8)
    known = Frequencies(routing_frequencies(model), "made up", inside=() if shares is None else (shares,) * 3)
    vram = options.pop("vram", None)
    return plan_outcome(model, known, on or machine(), granted(vram), replace(chosen, **options))  # type: ignore[arg-type]


def relu(shared: int = 0) -> ModelShape:
    return replace(expert_shape(shared=shared), activation="relu")


def test_times_are_those_of_the_bytes_that_are_read() -> None:
    """The gate, the scales of all columns, and the up rows and codes of active neurons; by level, of the
    experts that are cold there, as often as tokens take each."""
    result = planned(relu(), 0.4, on=machine(vram=None))
    frequencies, shares = routing_frequencies(relu()), 0.4 * np.linspace(1.0, 0.5, 8)
    for index, table in enumerate(result.placement.tables[:3]):
        assert table.mode.tolist() == [0, 1]
        density = float((frequencies[index] * shares).sum() / frequencies[index].sum())
        read = GATE + SCALES + density * (UP + DOWN - SCALES)
        assert table.cold_seconds[0] == pytest.approx(2 * (GATE + UP + DOWN) / 2e10)
        assert table.cold_seconds[1] == pytest.approx(2 * read / 2e10 / 0.8)
        assert table.padding.tolist() == [0, 8 * PADDING]
        assert table.ram[1] - table.ram[0] == 8 * PADDING
    assert [int(k) for k in result.placement.solution.choice[:3]] == [1, 1, 1]
    assert result.memory.ram_units["ffn"] == 3 * 8 * (GATE + UP + DOWN + PADDING)


def test_what_is_cold_is_what_counts() -> None:
    """With the busiest experts on the accelerator, the density is that of the others."""
    result = planned(relu(), 0.6)
    frequencies, shares = routing_frequencies(relu())[0], 0.6 * np.linspace(1.0, 0.5, 8)
    table = result.placement.tables[0]
    assert table.hot.tolist() == [128 * k for k in range(9)] * 2
    assert table.counts == 9
    share = np.concatenate([[0.0], np.cumsum(frequencies)]) / frequencies.sum()
    for hot in range(8):
        cold = frequencies[hot:]
        density = float((cold * shares[hot:]).sum() / cold.sum())
        read = GATE + SCALES + density * (UP + DOWN - SCALES)
        assert table.cold_seconds[9 + hot] == pytest.approx(2 * (1 - share[hot]) * read / 2e10 / 0.8)
        assert table.padding[9 + hot] == (8 - hot) * PADDING
        assert table.hot_seconds[9 + hot] == table.hot_seconds[hot]
    assert table.cold_seconds[17] == 0.0


@pytest.mark.parametrize(("inside", "modes"), [(0.4, [1, 1, 1]), (0.95, [0, 0, 0]), (None, [0, 0, 0])])
def test_the_faster_form_is_chosen(inside: float | None, modes: list[int]) -> None:
    result = planned(relu(), inside, on=machine(vram=None))
    choice = result.placement.solution.choice
    assert [int(t.mode[k]) for t, k in zip(result.placement.tables, choice, strict=True)][:3] == modes


def test_the_curve_of_experts_is_the_stream() -> None:
    curve = FFNCurve(256, 128, "Q4_1", "Q4_1", "Q4_1", 1e10, (1.0,), (1e10,), (1e10,), 1e-6)
    on = replace(machine(vram=None), ffn_curves=(curve,))
    table = planned(relu(), 0.4, on=on).placement.tables[0]
    whole = (GATE + UP + DOWN) / 1e10 + 1e-6
    assert table.cold_seconds[0] == pytest.approx(2 * whole)
    assert table.cold_seconds[1] < table.cold_seconds[0]


@pytest.mark.parametrize("kind", ["silu", "F16", "scaled"])
def test_experts_whose_neurons_cannot_be_left_out(kind: str) -> None:
    model = relu() if kind != "silu" else expert_shape()
    layer = model.layers[0]
    assert layer.experts is not None
    if kind == "F16":
        layer = replace(layer, down=MatrixShape(RowType.F16, 256, 128))  # type: ignore[arg-type]
    if kind == "scaled":
        layer = replace(layer, experts=replace(layer.experts, scaled=True))
    model = replace(model, layers=(layer,) * 3)
    table = planned(model, 0.2, on=machine(vram=None)).placement.tables[0]
    assert table.mode.tolist() == [0]


def test_experts_on_disk_are_whole_and_so_are_all_others() -> None:
    """The engine computes none in part then."""
    disk = Disk(((4096, 1e8), (1 << 20, 2e9)))
    on = replace(machine(vram=None), disk=disk)
    whole = planned(relu(), 0.4, on=on)
    room = whole.memory.ram_used - 6 * (GATE + UP + DOWN)
    result = plan_outcome(
        relu(),
        replace(whole.frequencies),
        on,
        granted(None, room),
        replace(whole.options, batch=16),
    )
    assert result.memory.disk_used > 0
    choice = result.placement.solution.choice
    assert all(int(t.mode[k]) == 0 for t, k in zip(result.placement.tables, choice, strict=True))


def test_prompts_are_slower_where_neurons_may_be_left_out() -> None:
    result = planned(relu(), 0.4, on=machine(vram=None), prompt=512, generate=16)
    table = result.placement.tables[0]
    assert table.prompt_seconds[1] > table.prompt_seconds[0]
    much = planned(relu(), 0.4, on=machine(vram=None), prompt=32768, generate=1, context=2048)
    choice = much.placement.solution.choice
    assert [int(t.mode[k]) for t, k in zip(much.placement.tables, choice, strict=True)][:3] == [0, 0, 0]


@pytest.mark.parametrize("row_type", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"])
def test_the_padding_is_what_the_layout_takes(row_type: str) -> None:
    """Beyond tiles, whose own size is another matter."""
    kind, neurons, width = RowType[row_type], 256, 512
    up = MatrixShape(kind, neurons, width)  # type: ignore[arg-type]
    layer = LayerShape((), up, up, MatrixShape(kind, width, neurons), 0)  # type: ignore[arg-type]
    with Pool(1) as pool:

        def packed(rows: int, columns: int, layout: Layout) -> int:
            data = np.zeros(rows * row_bytes(kind, columns), np.uint8)
            return Matrix.pack(pool, data, kind, rows, columns, layout).nbytes

        taken = packed(neurons, width, Layout.PICKED_ROWS) + packed(width, neurons, Layout.PICKED_COLUMNS)
        tiles = neurons * packed_row_bytes(kind, width) + packed(width, neurons, Layout.TILES)
    assert memory.picked_padding(layer) == taken - tiles


SHAPE = Shape("llama", 2, 128, 2, 1, 64, 96, 300, 1e4, tied=True, experts=6, used=2, activation="relu")


class Made:
    """A small mixture with true zeros, its profile, and the planner's split file."""

    def __init__(self, folder: Path, density: float = 0.3) -> None:
        self.source, self.saved = folder / "m.gguf", folder / "m.profile.safetensors"
        write_synthetic(self.source, "m", SHAPE, "Q4_0", density=density)
        model = load_model(self.source)
        profile_of(model).save(self.saved)
        self.profile, self.shape = Profile.load(self.saved), shape_of_model(model)
        model.close()
        self.folder = folder

    def plan(self, hot: int = 0) -> Plan:
        options = PlanOptions(context=len(TOKENS), batch=16)
        made = make_plan(self.shape, self.profile, PC_LOW, granted(0), options)
        layers = [replace(layer, hot_neurons=96 * hot) for layer in made.layers]
        return replace(made, layers=tuple(layers))

    def convert(self, plan: Plan) -> Path:
        plan.save(self.folder / "plan.json")
        output = self.folder / f"{plan.layers[0].hot_neurons}.powerinfer.gguf"
        convert(ConvertOptions(self.source, self.saved, self.folder / "plan.json", output))
        return output


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("inside"))


def test_frequencies_are_in_the_order_of_the_experts(made: Made) -> None:
    known = model_frequencies(made.shape, made.profile)
    assert len(known.inside) == 2
    for index, inside in enumerate(known.inside):
        shares, order = made.profile.expert_density(index), made.profile.order(index)
        assert shares is not None
        assert inside is not None
        assert inside.tolist() == shares[order].tolist()
        assert 0.1 < inside.mean() < 0.5
    assert "of a taken expert's neurons" in known.source
    only = replace(made.profile, sums=tuple(replace(layer, inside=None) for layer in made.profile.sums))
    assert model_frequencies(made.shape, only).inside == ()


def test_a_plan_says_what_it_does_and_what_it_does_not(made: Made) -> None:
    plan = made.plan()
    assert [layer.mode for layer in plan.layers] == ["gate-first"] * 2
    told = render_plan(plan)
    assert "gate-first" in told
    assert "of a taken expert's neurons" in told
    assert "Experts are placed as wholes: the neurons inside are counted" in plan.verdict
    dense = make_plan(made.shape, None, PC_LOW, granted(0), PlanOptions(context=len(TOKENS), batch=16))
    assert [layer.mode for layer in dense.layers] == ["dense"] * 2
    assert "neurons inside" not in dense.verdict


@pytest.mark.parametrize("hot", [0, 2, 5])
def test_a_split_file_runs_as_planned_with_the_bits_of_its_source(made: Made, hot: int) -> None:
    path = made.convert(made.plan(hot))
    split = SplitFile.open(path)
    assert split.modes == ("gate-first",) * 2
    split.close()
    assert [layer["mode"] for layer in describe(path).facts["layers"]] == ["gate-first"] * 2
    expected = logits(made.source, TOKENS, mode="dense")
    for options in ({}, {"threads": 3}, {"mode": "dense"}, {"device": "none"}):
        np.testing.assert_array_equal(logits(path, TOKENS, **options), expected)
    with Engine(load_model(path), threads=1) as engine:
        engine.absorb(TOKENS)
        report = engine.report()
    assert report.mode == "gate-first"
    assert report.density < 0.7 * 2 / 6
    beside = logits(path, TOKENS, device="cpu")
    np.testing.assert_array_equal(logits(path, TOKENS, device="cpu", mode="dense"), beside)
    np.testing.assert_allclose(beside, expected, rtol=0.05, atol=0.05 * float(np.abs(expected).max()))


def test_from_disk_the_same_file_is_computed_whole(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(model: object, pool: Pool, options: from_disk.RamOptions, **_: object) -> FromDisk:
        residency = Residency(model, pool)  # type: ignore[arg-type]
        budget = Budget(residency.readers_bytes + residency.whole_bytes + 1, 16, None, False)
        return FromDisk(residency, budget, ("from disk",))

    path = made.convert(made.plan())
    expected = logits(path, TOKENS)
    monkeypatch.setattr(weights_module, "open_from_disk", opened)
    np.testing.assert_array_equal(logits(path, TOKENS), expected)
    with pytest.raises(ModelError, match="experts that are read from disk are computed whole"):
        Engine(load_model(path), threads=1, mode="gate-first")


def test_a_file_that_cannot_run_so_is_refused(made: Made, tmp_path: Path) -> None:
    """The same plan for a model of floats, whose columns cannot be left out."""
    other = tmp_path / "f.gguf"
    write_synthetic(other, "f", SHAPE, "F16", density=0.3)
    model = load_model(other)
    profile_of(model).save(tmp_path / "f.profile.safetensors")
    shape = shape_of_model(model)
    model.close()
    assert not shape.picks_in_experts
    profile = Profile.load(tmp_path / "f.profile.safetensors")
    plan = make_plan(shape, profile, PC_LOW, granted(0), PlanOptions(context=len(TOKENS), batch=16))
    assert [layer.mode for layer in plan.layers] == ["dense"] * 2
    layers = tuple(replace(layer, mode="gate-first") for layer in plan.layers)
    replace(plan, layers=layers).save(tmp_path / "plan.json")
    output = tmp_path / "f.powerinfer.gguf"
    saved = tmp_path / "f.profile.safetensors"
    convert(ConvertOptions(other, saved, tmp_path / "plan.json", output))
    with pytest.raises(ModelError, match=r"experts run in mode dense alone|its experts are computed whole"):
        Engine(load_model(output), threads=1)
