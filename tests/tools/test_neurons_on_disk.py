"""Sparse models larger than memory: bits for every budget and mode, memory, faults, and what is said."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from powerinfer_kernels import Pool
from powerinfer_tools.engine import Engine, neurons_on_disk
from powerinfer_tools.engine import weights as weights_module
from powerinfer_tools.engine.from_disk import FromDisk, RamOptions
from powerinfer_tools.engine.neurons_on_disk import NeuronsOnDisk
from powerinfer_tools.engine.weights_on_disk import Budget
from powerinfer_tools.errors import ModelError
from powerinfer_tools.measure.synthetic.shapes import SHAPES
from powerinfer_tools.measure.synthetic.sparse import Sparsity, write_sparse
from powerinfer_tools.model.loading import Model, load_model

#: 6 layers of 4,096 neurons: 36 MiB of records.
SHAPE = replace(
    SHAPES["mistral-7b"],
    layers=6,
    width=512,
    heads=8,
    kv_heads=2,
    head_dim=64,
    neurons=4096,
    vocabulary=2048,
)
TOKENS = [int(token) for token in np.random.default_rng(1).integers(5, 2000, 40)]
SHARES = (0.25, 0.4, 0.6, 0.8, 1.1)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("sparse") / "sparse.powerinfer.gguf"
    write_sparse(made, "test", SHAPE, "Q4_0", Sparsity(0.1, 0.3))
    return made


@pytest.fixture
def budget(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Every model runs from disk, with as much of its neurons in memory as the test says."""
    wanted = {"share": 1.0}

    def opened(
        model: Model, pool: Pool, options: RamOptions, *, batch: int, mode: str | None, **_: object
    ) -> FromDisk:
        disk = NeuronsOnDisk(model, pool, mode)
        nbytes = int(disk.whole_bytes * wanted["share"]) + (4 << 20)
        static = options.placing == "static"
        return FromDisk(disk, Budget(disk.readers_bytes + nbytes, batch, None, static), ())

    monkeypatch.setattr(weights_module, "open_from_disk", opened)
    return wanted


def rows(path: Path, mode: str, placing: str = "adaptive") -> tuple[np.ndarray, Engine]:
    engine = Engine(load_model(path), threads=2, mode=mode, batch=16, ram=RamOptions(None, placing))  # type: ignore[arg-type]
    try:
        half = len(TOKENS) // 2
        found = [engine.prefill(TOKENS[:half]).copy(), *(engine.decode(t).copy() for t in TOKENS[half:])]
        engine.final = engine.report().disk  # type: ignore[attr-defined]
        return np.stack(found), engine
    finally:
        engine.close()


@pytest.mark.parametrize("mode", ["gate-first", "predicted"])
def test_bits_are_those_in_memory_for_five_budgets(
    path: Path, mode: str, budget: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a mode with predictors read ahead."""
    monkeypatch.setattr(neurons_on_disk, "spare_cores", lambda _: 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights_module, "open_from_disk", lambda *_, **__: None)
        expected, _ = rows(path, mode)
    read = []
    for share in SHARES:
        budget["share"] = share
        got, engine = rows(path, mode, "static" if share == 0.6 else "adaptive")
        assert np.array_equal(got, expected)
        report = engine.final  # type: ignore[attr-defined]
        assert report.what == "neurons"
        assert report.taken > report.hits > 0 or share > 1
        assert (report.ahead > 0) == (mode == "predicted") or share > 0.5
        read.append(report.read_bytes)
    assert read == sorted(read, reverse=True)
    assert read[-1] == 0


def test_the_busiest_are_there_from_the_beginning(path: Path, budget: dict[str, float]) -> None:
    """With half of the neurons, far more than half of those that tokens take are in memory."""
    budget["share"] = 0.5
    _, engine = rows(path, "gate-first")
    with_prompt = engine.final  # type: ignore[attr-defined]
    assert with_prompt.hit_share > 0.6


SCRIPT = """
import sys
from powerinfer_tools.detect import resident_bytes
from powerinfer_tools.engine import Engine, neurons_on_disk
from powerinfer_tools.engine.from_disk import RamOptions
from powerinfer_tools.model.loading import load_model
path, ram = sys.argv[1], int(sys.argv[2])
model = load_model(path)
ram = ram and resident_bytes() + ram
engine = Engine(model, context=128, threads=2, mode="gate-first", ram=RamOptions(ram or None))
engine.prefill(list(range(5, 37)))
for token in range(24): logits = engine.decode(token + 7).copy()
peak = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")]
from_disk, bits = engine.stack.residency is not None, logits.tobytes().hex()[:9]
print(int(peak[0]) * 1024, ram, from_disk, bits, *engine.notices, sep="|")
"""


def test_memory_is_what_was_asked_for(path: Path) -> None:
    def run(ram: int) -> list[str]:
        command = [sys.executable, "-c", SCRIPT, str(path), str(ram)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip().split("|")

    peak, ram, disk, bits, *notices = run((34 << 20) + path.stat().st_size // 2)
    assert disk == "True"
    assert int(peak) <= int(ram)
    assert "of the neurons are in memory at a time, the busiest first" in notices[0]
    assert "single neurons a second; how many a token takes is not known without a profile" in notices[1]
    whole = run(0)
    assert whole[2:4] == ["False", bits]


def test_a_file_that_is_cut_ends_with_a_line(path: Path, tmp_path: Path, budget: dict[str, float]) -> None:
    copy = tmp_path / path.name
    copy.write_bytes(path.read_bytes())
    budget["share"] = 0.4
    engine = Engine(load_model(copy), threads=2, mode="gate-first", batch=8)
    engine.decode(7)
    with copy.open("r+b") as file:
        file.truncate(copy.stat().st_size // 4)
    with pytest.raises(ModelError, match=r"could not be read while the model ran: the file (ends|was)"):
        engine.prefill(TOKENS)
    engine.close()


def test_what_cannot_be_read_so(path: Path, budget: dict[str, float]) -> None:
    with pytest.raises(ModelError, match="layer 0 is computed dense, so a token takes all of its neurons"):
        Engine(load_model(path), mode="dense")
    budget["share"] = -0.1
    with pytest.raises(ModelError, match="MiB are left for neurons beside what every token needs"):
        Engine(load_model(path), mode="gate-first")
