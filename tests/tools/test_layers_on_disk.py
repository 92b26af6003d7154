"""Dense models larger than memory: bits for every budget, the order of reading, memory, and what is said."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from powerinfer_kernels import KernelError, Matrix, Part, Pool, ProgramBuilder, Units
from powerinfer_tools.engine import Engine
from powerinfer_tools.engine import weights as weights_module
from powerinfer_tools.engine.from_disk import FromDisk, RamOptions
from powerinfer_tools.engine.layers_on_disk import LayersOnDisk
from powerinfer_tools.engine.weights_on_disk import Budget
from powerinfer_tools.errors import ModelError
from powerinfer_tools.measure.synthetic.models import write_synthetic
from powerinfer_tools.measure.synthetic.shapes import Shape
from powerinfer_tools.model.loading import Model, load_model
from tiny_models import CASES, FAMILY_CASES, make_tiny_model

LAYERS = 8
FAMILIES = {"llama-Q4_0": CASES["llama-Q4_0"], **{name: FAMILY_CASES[name] for name in ("llama-relu",)}}


@pytest.fixture
def budget(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Every model runs from disk, with as many FFNs in memory as the test says."""
    wanted = {"slots": LAYERS}

    def opened(model: Model, pool: Pool, options: RamOptions, *, batch: int, **_: object) -> FromDisk:
        disk = LayersOnDisk(model, pool)
        nbytes = disk.whole_bytes * wanted["slots"] // LAYERS + 1
        disk.prepare(nbytes)
        return FromDisk(disk, Budget(disk.readers_bytes + nbytes, min(batch, 3)), (disk.notice(nbytes),))

    monkeypatch.setattr(weights_module, "open_from_disk", opened)
    return wanted


def rows(path: Path, tokens: list[int]) -> tuple[np.ndarray, Engine]:
    half = len(tokens) // 2
    engine = Engine(load_model(path), threads=2)
    try:
        found = [engine.prefill(tokens[:half]).copy(), *(engine.decode(t).copy() for t in tokens[half:])]
        engine.final = engine.report().disk  # type: ignore[attr-defined]
        return np.stack(found), engine
    finally:
        engine.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_bits_are_those_in_memory_for_five_budgets(
    family: str, tmp_path: Path, budget: dict[str, int]
) -> None:
    tiny = make_tiny_model(tmp_path, replace(FAMILIES[family], layers=LAYERS))
    tokens = tiny.tokens(16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights_module, "open_from_disk", lambda *_, **__: None)
        expected, _ = rows(tiny.path, tokens)
    read = []
    for slots in (3, 4, 5, 7, 8):
        budget["slots"] = slots
        got, engine = rows(tiny.path, tokens)
        assert np.array_equal(got, expected)
        stays = 8 if slots == 8 else slots - 3
        assert f"the FFNs of {stays} of 8 layers stay in memory" in engine.notices[0]
        report = engine.final  # type: ignore[attr-defined]
        passes = 3 + 8  # of three tokens, and single ones
        assert report.taken == 8 * passes
        assert report.hits >= stays * passes
        assert report.what == "FFNs"
        read.append(report.read_bytes)
    assert read == sorted(read, reverse=True)
    assert read[-1] < read[-2]


def test_what_passes_through_is_read_once_a_pass(tmp_path: Path, budget: dict[str, int]) -> None:
    """Nothing is thrown out before it is used, and nothing is read that is not."""
    tiny = make_tiny_model(tmp_path, replace(CASES["llama-Q4_0"], layers=LAYERS))
    budget["slots"] = 5
    _, engine = rows(tiny.path, tiny.tokens(24))
    report = engine.final  # type: ignore[attr-defined]
    passes = 4 + 12
    each = report.read_bytes / (2 + 6 * passes)
    source = load_model(tiny.path)
    layer = source.layers[0].ffn
    size = sum(weight.data.nbytes for weight in (layer.first, layer.factor, layer.down))  # type: ignore[union-attr]
    source.close()
    assert each <= size * (1 + 3 / (6 * passes))  # at the end two are on their way that nobody takes
    assert report.hits + report.late > 0.9 * report.taken


#: 16 FFNs of 2.5 MiB.
SHAPE = Shape("llama", 16, 512, 8, 2, 64, 3072, 2048, 1e6)
SCRIPT = """
import sys
from powerinfer_tools.detect import resident_bytes
from powerinfer_tools.engine import Engine
from powerinfer_tools.engine.from_disk import RamOptions
from powerinfer_tools.model.loading import load_model
path, ram = sys.argv[1], int(sys.argv[2])
model = load_model(path)
ram = ram and resident_bytes() + ram
engine = Engine(model, context=128, threads=2, ram=RamOptions(ram or None))
engine.prefill(list(range(5, 37)))
for token in range(24): logits = engine.decode(token + 7).copy()
peak = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")]
from_disk, bits = engine.stack.residency is not None, logits.tobytes().hex()[:9]
print(int(peak[0]) * 1024, ram, from_disk, bits, *engine.notices, sep="|")
"""


def test_memory_is_what_was_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "dense.gguf"
    write_synthetic(path, "test", SHAPE, "Q4_0")

    def run(ram: int) -> list[str]:
        command = [sys.executable, "-c", SCRIPT, str(path), str(ram)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip().split("|")

    peak, ram, disk, bits, *notices = run((30 << 20) + path.stat().st_size // 2)
    assert disk == "True"
    assert int(peak) <= int(ram)
    assert "layers stay in memory, the others are read from disk for every token" in notices[0]
    assert "a dense model has no locality: every token reads" in notices[1]
    whole = run(0)
    assert whole[2:4] == ["False", bits]
    assert int(whole[0]) > int(ram)


def test_too_few_slots(tmp_path: Path, budget: dict[str, int]) -> None:
    tiny = make_tiny_model(tmp_path, replace(CASES["llama-Q4_0"], layers=LAYERS))
    budget["slots"] = 2
    with pytest.raises(ModelError, match="MiB are left for FFNs beside what every token needs"):
        Engine(load_model(tiny.path))


def test_programs_fetch_what_there_is() -> None:
    units, pool = Units(), Pool(1)
    for _ in range(3):
        units.add([Part(Matrix.absent(pool, 0, 16, 32), 0, 0, 0)])
    builder = ProgramBuilder(1)
    with pytest.raises(KernelError, match=r"units \(1, 3\) are not all among 3"):
        builder.fetch_all(units, 1, [3])
    with pytest.raises(KernelError, match="3 units ahead, of 2 at most"):
        builder.fetch_all(units, 0, [1, 2, 0])
