"""Mode thresholded in plans: its seconds, when it is worth it, and what a file of thresholds offers."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from plan_cases import machine, shape, skewed_frequencies
from powerinfer_formats.errors import OtherModel
from powerinfer_formats.hardware import CpuInfo, FFNCurve, HardwareProfile, MachineInfo
from powerinfer_formats.modes import MODES
from powerinfer_formats.thresholds import ThresholdCost, Thresholds, ThresholdsHeader
from powerinfer_tools.engine import Engine
from powerinfer_tools.errors import ConvertError, PlanError
from powerinfer_tools.model.loading import load_model
from powerinfer_tools.model.shapes import neuron_bytes
from powerinfer_tools.stages.convert.conversion import ConvertOptions, convert
from powerinfer_tools.stages.plan import PlanRequest, costs, make_plan
from powerinfer_tools.stages.plan.ffn_levels import FFN, mode_seconds
from powerinfer_tools.stages.plan.frequencies import Frequencies
from powerinfer_tools.stages.plan.milp import SolverOptions
from powerinfer_tools.stages.plan.planner import Budgets, Outcome, PlanOptions, plan_outcome
from powerinfer_tools.stages.plan.thresholded_shapes import ThresholdOffer, ThresholdShape, offer_thresholds
from powerinfer_tools.stages.plan.verdict import verdict
from powerinfer_tools.stages.threshold import ThresholdOptions, run_threshold
from predicted_models import profiled
from tiny_models import FAMILY_CASES, make_tiny_model

LAYERS, NEURONS = 4, 512
# Q4_1 gate and up rows of 256 and a Q8_0 down row.
GATE, UP, DOWN = 160, 160, 272


def outcome(densities: tuple[float | None, ...], vram: int | None = None, known: int = 0) -> Outcome:
    model = shape(LAYERS, NEURONS)
    shapes = tuple(None if density is None else ThresholdShape(known, density) for density in densities)
    frequencies = Frequencies(skewed_frequencies(LAYERS, NEURONS), "made up", (), shapes)
    options = PlanOptions(solver=SolverOptions(gap=0.0), context=1024)
    return plan_outcome(model, frequencies, machine(vram=vram), Budgets(), options)


def modes(result: Outcome) -> list[str]:
    pairs = zip(result.placement.tables[:LAYERS], result.placement.solution.choice, strict=False)
    return [MODES[int(table.mode[k])] for table, k in pairs]


@pytest.mark.parametrize("known", [0, 1])
def test_seconds_are_those_of_the_bytes(known: int) -> None:
    """The known factor of every cold neuron streams, the other two rows of a share of them are gathered."""
    layer = shape(1, NEURONS).layers[0]
    ffn = FFN(layer, neuron_bytes(layer), np.ones(NEURONS), False, None, ThresholdShape(known, 0.25))
    here = machine(vram=None)
    hot = np.array([0, 128, NEURONS])
    cold = (NEURONS - hot).astype(np.float64)
    always = (GATE, UP)[known]
    expected = costs.gate_first_seconds(
        cold * always, cold * (GATE + UP + DOWN - always), np.full(3, 0.25), here
    )
    np.testing.assert_allclose(mode_seconds(ffn, "thresholded", hot, here), expected, rtol=1e-12)


def test_layers_are_thresholded_where_that_is_faster() -> None:
    """At a third of the neurons it saves reads, at all of them it does not; without thresholds it cannot."""
    result = outcome((0.3, 0.3, 1.0, None))
    assert modes(result) == ["thresholded", "thresholded", "dense", "dense"]
    assert result.placement.seconds < outcome((None,) * LAYERS).placement.seconds
    assert "In 2 of 4 layers neurons with a small factor are left out: not exact." in verdict(result)
    assert "not exact" not in verdict(outcome((None,) * LAYERS))


def test_what_is_hot_is_computed_whole() -> None:
    """With room for everything on a fast accelerator, there is nothing to leave out."""
    with_room, without = outcome((0.3,) * LAYERS, 1 << 32), outcome((None,) * LAYERS, 1 << 32)
    pairs = zip(with_room.placement.tables[:LAYERS], with_room.placement.solution.choice, strict=False)
    assert [int(table.hot[k]) for table, k in pairs] == [NEURONS] * LAYERS
    assert modes(with_room) == ["dense"] * LAYERS
    assert with_room.placement.seconds == without.placement.seconds


MODEL = replace(shape(LAYERS, NEURONS), fingerprint="ab" * 32, name="m")


def saved(folder: Path, factors: tuple[str, ...], perplexity: float = 10.1, **changes: object) -> Path:
    header = ThresholdsHeader(
        fingerprint=str(changes.get("fingerprint", "ab" * 32)),
        model_name="m",
        activation="silu",
        neurons=NEURONS,
        max_increase=0.05,
        factors=factors,  # type: ignore[arg-type]
        densities=tuple(1.0 if factor == "none" else 0.4 for factor in factors),
        uniform_density=0.5,
        cost=ThresholdCost(10.0, perplexity, 0.001, 0.01, 4096),
        text_sha256="cd" * 32,
        tool_version="test",
    )
    values = tuple(None if factor == "none" else np.ones(NEURONS, np.float32) for factor in factors)
    path = folder / "m.thresholds.safetensors"
    Thresholds(header, values).save(path)
    return path


FACTORS = ("gate", "none", "up", "gate")


def test_an_offer_within_the_budget(tmp_path: Path) -> None:
    found = offer_thresholds(saved(tmp_path, FACTORS), MODEL, 0.02)
    gate, up = ThresholdShape(0, 0.4), ThresholdShape(1, 0.4)
    assert found.layers == (gate, None, up, gate)
    told = "measured to change the perplexity by +1.00 % over 4,096 tokens"
    assert found.note == f"m.thresholds.safetensors: for 3 of 4 layers, {told}"


@pytest.mark.parametrize(
    ("factors", "allowed", "said"),
    [
        (FACTORS, 0.0, "not used, --max-ppl-increase is 0"),
        (FACTORS, 0.005, "by +1.00 % over 4,096 tokens, more than the 0.5 % that --max-ppl-increase allows"),
        (("none",) * LAYERS, 0.5, "every layer is dense in it"),
    ],
)
def test_an_offer_that_may_not_be_used(
    tmp_path: Path, factors: tuple[str, ...], allowed: float, said: str
) -> None:
    found = offer_thresholds(saved(tmp_path, factors), MODEL, allowed)
    assert found == ThresholdOffer((), found.note)
    assert said in found.note


def test_from_files_to_a_split_file_and_its_engine(tmp_path: Path) -> None:
    """The stages on a tiny model, on a machine where leaving neurons out pays: the plan says it, the split
    file keeps it, and the engine follows without being asked."""
    tiny = make_tiny_model(tmp_path, replace(FAMILY_CASES["llama"], neurons=192))
    profile = profiled(tmp_path, tiny)
    text = tmp_path / "text.txt"
    thresholds = tmp_path / "tiny.thresholds.safetensors"
    found = run_threshold(ThresholdOptions(tiny.path, profile, text.read_text(), thresholds, 0.05, 64, 4, 1))
    assert any(factor != "none" for factor in found.header.factors)
    rates = ((0.01, 1.0), (1e12, 1e12), (1e12, 1e12))
    curve = FFNCurve(64, 192, "F32", "F32", "F32", 1e9, *rates)
    cpu = CpuInfo("a CPU", 1, "scalar", 1e10, 1 << 34, (1.0,), (1e10,))
    hardware = tmp_path / "hardware.toml"
    HardwareProfile(MachineInfo("m", "measured", "2026-11-25"), cpu, ffn=(curve,)).save(hardware)
    request = PlanRequest(
        tiny.path, profile=profile, thresholds=thresholds, hardware=str(hardware), max_ppl_increase=0.5
    )
    plan = make_plan(request)
    wanted = tuple("dense" if factor == "none" else "thresholded" for factor in found.header.factors)
    assert tuple(layer.mode for layer in plan.layers) == wanted
    assert "tiny.thresholds.safetensors: for" in plan.provenance.thresholds
    exact = make_plan(replace(request, max_ppl_increase=0.0))
    assert {layer.mode for layer in exact.layers} == {"dense"}
    assert "exact modes only" in exact.provenance.thresholds
    path, split = tmp_path / "tiny.plan.json", tmp_path / "tiny.powerinfer.gguf"
    plan.save(path)
    convert(ConvertOptions(tiny.path, profile, path, split, quant="F32", thresholds=thresholds))
    without = ConvertOptions(tiny.path, profile, path, tmp_path / "x", quant="F32")
    with pytest.raises(ConvertError, match=r"in mode thresholded, and no thresholds are given for it; give"):
        convert(without)
    assert not (tmp_path / "x").exists()
    engine = Engine(load_model(split), threads=1, context=64)
    engine.prefill(tiny.tokens(4))
    engine.decode(5)
    assert engine.stack.modes == wanted
    assert engine.report().density < 1
    engine.close()


def test_thresholds_of_another_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OtherModel, match="was made for the model 'm'"):
        offer_thresholds(saved(tmp_path, FACTORS, fingerprint="ef" * 32), MODEL, 0.1)
    with pytest.raises(PlanError, match="a shape has none"):
        offer_thresholds(saved(tmp_path, FACTORS), shape(LAYERS, NEURONS), 0.1)
