"""advise: just run it, or prepare it, and the commands for either."""

from dataclasses import replace
from pathlib import Path

import pytest

from powerinfer_formats.plan import Plan
from powerinfer_tools import detect
from powerinfer_tools.errors import PlanError
from powerinfer_tools.inspect.advice import WORTH, advise, dense_seconds, split_verdict
from powerinfer_tools.measure.hardware.presets import PC_LOW
from powerinfer_tools.model.loading import load_model
from powerinfer_tools.model.shapes import shape_of_model
from powerinfer_tools.stages.plan.machine import machine_of
from powerinfer_tools.stages.plan.memory import Workload
from split_models import Prepared


@pytest.fixture
def cpu_only(tmp_path: Path) -> str:
    """A hardware profile without an accelerator."""
    path = tmp_path / "cpu.toml"
    replace(PC_LOW, gpu=None, link=None).save(path)
    return str(path)


@pytest.fixture(scope="module")
def silu(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return Prepared(tmp_path_factory.mktemp("silu"), "llama-Q4_1")


@pytest.fixture(scope="module")
def relu(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return Prepared(tmp_path_factory.mktemp("relu"), "llama-relu")


def test_without_true_zeros_and_accelerator_just_run_it(silu: Prepared, cpu_only: str) -> None:
    advice = advise(silu.tiny.path, hardware=cpu_only)
    assert not advice.true_zeros
    assert [way.name for way in advice.ways] == ["as it is"]
    assert advice.verdict.startswith("Just run it: silu makes no true zeros")
    assert f"powerinfer run -m {silu.tiny.path}" in advice.verdict


def test_true_zeros_are_to_be_counted_first(relu: Prepared, cpu_only: str) -> None:
    advice = advise(relu.tiny.path, hardware=cpu_only)
    assert advice.true_zeros
    way = advice.ways[1]
    assert (way.name, way.tokens_per_second, way.exact) == ("gate-first", None, True)
    assert f"powerinfer profile -m {relu.tiny.path} --corpus FILE" in advice.verdict


def test_a_profile_prices_the_zeros(relu: Prepared, cpu_only: str) -> None:
    advice = advise(relu.tiny.path, profile=relu.profile, hardware=cpu_only)
    dense, sparse = (way.tokens_per_second for way in advice.ways)
    assert dense is not None
    assert sparse is not None
    assert "of the neurons fire for a token (profile of" in advice.ways[1].detail
    assert advice.verdict.startswith("Prepare it" if sparse >= WORTH * dense else "Just run it")


def test_a_profile_of_another_model_is_refused(silu: Prepared, relu: Prepared, cpu_only: str) -> None:
    with pytest.raises(PlanError, match="was made for"):
        advise(relu.tiny.path, profile=silu.profile, hardware=cpu_only)


def test_an_accelerator_is_a_way(silu: Prepared) -> None:
    advice = advise(silu.tiny.path, hardware="pc-low")
    assert advice.accelerator == "NVIDIA GeForce RTX 2080 Ti"
    assert [way.name for way in advice.ways] == ["as it is", "split"]
    assert "not yet confirmed on any GPU" in advice.ways[1].detail


def test_what_does_not_fit_is_said(silu: Prepared, cpu_only: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POWERINFER_HARDWARE", cpu_only)
    monkeypatch.setattr(detect, "available_ram_bytes", lambda: 1 << 20)
    advice = advise(silu.tiny.path)
    assert not advice.fits
    assert "do not fit in the memory that is free" in advice.verdict


def test_dense_seconds_count_every_byte_once(silu: Prepared) -> None:
    model = load_model(silu.tiny.path)
    shape, machine = shape_of_model(model), machine_of(PC_LOW)
    model.close()
    weights = sum(matrix.packed_nbytes for layer in shape.layers for matrix in layer.matrices)
    weights += shape.head.packed_nbytes + sum(layer.vector_bytes for layer in shape.layers)
    cache = len(shape.layers) * 2 * shape.kv_heads * shape.head_dim * 2  # one position in half precision
    assert dense_seconds(shape, machine, Workload(1, 1, "f16")) == pytest.approx(
        (weights + cache) / machine.bandwidth
    )


def test_a_split_file_says_what_it_will_be_here(silu: Prepared, tmp_path: Path) -> None:
    hot = [silu.neurons // 2] * silu.layers
    silu.save_plan(tmp_path / "plan.json", hot)
    verdict = split_verdict(silu.tiny.path, Plan.load(tmp_path / "plan.json"))
    assert "× the bytes of its source" in verdict.text
    assert "which this machine does not have" in verdict.text
    assert "no neuron is skipped" in verdict.text
    assert not verdict.in_vain  # it may be for another machine


def test_a_split_file_that_only_takes_more_room_is_in_vain(silu: Prepared, tmp_path: Path) -> None:
    none = [0] * silu.layers
    silu.save_plan(tmp_path / "plan.json", none)
    verdict = split_verdict(silu.tiny.path, Plan.load(tmp_path / "plan.json"))
    split = silu.split(none)
    written = split.stat().st_size / silu.tiny.path.stat().st_size
    assert verdict.in_vain == (written > 1.02)
    assert verdict.growth == pytest.approx(written, abs=0.15)  # records are padded, headers are written
    silu.save_plan(tmp_path / "plan.json", none, mode="gate-first")
    assert not split_verdict(silu.tiny.path, Plan.load(tmp_path / "plan.json")).in_vain
