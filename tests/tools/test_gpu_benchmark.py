"""``benchmarks/gpu.py``, whose only real run is on a GPU: what it does beside one."""

import importlib
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from powerinfer_kernels import RowType
from powerinfer_tools.engine.hot.faults import DeviceLost
from powerinfer_tools.engine.hot.hot_ffn import HotFFN
from split_models import GROUP, Prepared
from test_hot_side import FakeGpu, on

SIZES = ["--megabytes", "1", "--width", "256", "--positions", "40", "-n", "2"]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    module = importlib.import_module("gpu")
    kernels = importlib.import_module("gpu_kernels")
    monkeypatch.setattr(kernels.Sizes, "__init__", small(kernels.Sizes.__init__))
    return module


def small(init: object) -> object:
    """A matrix of a few rows, whatever was asked for."""

    def made(self: object, nbytes: int = 0, width: int = 256, context: int = 96) -> None:
        init(self, 1 << 14, width, context)  # type: ignore[operator]

    return made


def on_a_gpu(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, device: FakeGpu, reason: str | None) -> None:
    """Let the benchmark have ``device`` for a GPU, and the engine, too."""
    monkeypatch.setattr(gpu, "cuda_problem", lambda: None)
    monkeypatch.setattr(gpu, "open_device", lambda name: (device, reason))
    monkeypatch.setattr(gpu, "machine_lines", lambda name: ["a machine"])
    on(monkeypatch, FakeGpu(1 << 30))


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return Prepared(tmp_path_factory.mktemp("quantised"), "llama-Q4_1")


def test_without_a_gpu_it_measures_what_it_can_and_names_the_rest(
    gpu: ModuleType, quantised: Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, report = quantised.split([GROUP] * quantised.layers), tmp_path / "report.json"
    assert gpu.main(["--device", "cpu", *SIZES, "-m", str(path), "--json", str(report)]) == 0
    result = json.loads(report.read_text())
    assert result["wrong"] == []
    errors = {row["name"]: row["error"] for row in result["rows"] if row["error"] is not None}
    kinds = {name.split()[0] for name in errors}
    row_types = {
        "F16",
        "Q8_0",
        "Q4_0",
        "Q4_1",
        "Q5_0",
        "Q4_K",
        "Q5_K",
        "Q6_K",
        "Q2_K",
        "Q3_K",
        "IQ4_XS",
        "MXFP4",
    }
    assert kinds == row_types | {"attention", "ours,"}
    assert all((error > 0 or name[:4] == "ours") and error <= 1 for name, error in errors.items())
    assert all(row["speed"] > 0 for row in result["rows"])
    assert [row["name"].split(" on ")[0].split()[0] for row in result["rows"][-3:]] == ["ours,"] * 3
    said = capsys.readouterr().out
    assert "not measured, or not as asked: fused kernels: they run on CUDA only" in said
    assert "not measured, or not as asked: llama.cpp's layer offload" in said


def test_a_machine_without_cuda_is_told_so(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert gpu.main(["--device", "cuda"]) == 1
    assert "build without CUDA; --device cpu" in capsys.readouterr().err


def test_fused_kernels_are_checked_and_timed(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In Triton's interpreter, one row type."""
    kernels = importlib.import_module("gpu_kernels")
    monkeypatch.setattr(kernels, "ROW_TYPES", (RowType.Q4_K,))
    on_a_gpu(gpu, monkeypatch, FakeGpu(1 << 30), None)
    monkeypatch.setattr(importlib.import_module("gpu_run"), "WARM", 0)
    timed = gpu.Run.timed
    monkeypatch.setattr(gpu.Run, "timed", lambda run, work, *_, **__: timed(run, work, repetitions=1))
    assert gpu.main(["--device", "cuda", *SIZES]) == 0
    said = capsys.readouterr().out
    assert "Q4_K fused: FFN with relu" in said
    assert "attention over 40 positions, q8_0, fused" in said
    assert "WRONG" not in said
    assert "not as asked: the whole engine: no model was named" in said


def test_what_fails_is_one_line_and_the_rest_goes_on(
    gpu: ModuleType,
    quantised: Prepared,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A row type that computes something else, one that cannot be compiled, a device that is lost later."""
    compute = HotFFN.compute

    def failing(
        ffn: HotFFN, inputs: object, scratch: object, out: torch.Tensor, named: object = None
    ) -> None:
        if ffn.gate.row_type == RowType.Q8_0:
            raise OSError("no compiler\nmore")
        compute(ffn, inputs, scratch, out, named)  # type: ignore[arg-type]
        if ffn.gate.row_type == RowType.Q4_0:
            out += 1.0
        if ffn.gate.row_type == RowType.Q6_K:
            out *= np.nan

    monkeypatch.setattr(HotFFN, "compute", failing)
    on_a_gpu(gpu, monkeypatch, FakeGpu(1 << 30), "no reason")
    engines = importlib.import_module("gpu_engines")

    def lost(*_: object) -> float:
        raise DeviceLost("CUDA error: unspecified launch failure")

    monkeypatch.setattr(engines, "_decoded", lost)
    path = quantised.split([GROUP] * quantised.layers)
    assert gpu.main(["--device", "cuda", *SIZES, "-m", str(path)]) == 1
    said = capsys.readouterr().out
    wrong = [line for line in said.splitlines() if line.startswith("WRONG: ")]
    assert [line.split(":")[1].strip() for line in wrong] == [
        "logits with TF32 on and off", "Q8_0 rows, plain", "Q4_0 plain", "Q6_K plain", path.name,
    ]  # fmt: skip
    assert wrong[1] == "WRONG: Q8_0 rows, plain: OSError: no compiler"
    assert "times the error that rounding explains" in wrong[2]
    assert "DeviceLost: CUDA error: unspecified launch failure" in wrong[4]
    assert "Q4_K plain: FFN with relu" in said


def test_when_the_time_is_up_the_rest_is_named(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "LIMIT_SECONDS", 0.0)
    assert gpu.main(["--device", "cpu", *SIZES]) == 0
    assert "a read of the device's memory: the time was up" in capsys.readouterr().out


def test_a_split_file_is_made_by_the_stages(gpu: ModuleType, quantised: Prepared, tmp_path: Path) -> None:
    engines = importlib.import_module("gpu_engines")
    run = gpu.Run(FakeGpu(1 << 30), "cpu", 300.0)
    path = engines.make_split(run, quantised.tiny.path, tmp_path)
    assert run.wrong == []
    assert path is not None
    assert path.is_file()
    assert engines.make_split(run, tmp_path / "none.gguf", tmp_path) is None
    assert [line.split(":")[0] for line in run.wrong] == ["profile of none.gguf"]
