"""Sparse models larger than memory: bits for every budget and mode, memory, faults, and what is said."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import powerinfer
from powerinfer_formats.profile import Profile
from powerinfer_kernels import Pool
from powerinfer_tools.engine import Engine, neurons_on_disk
from powerinfer_tools.engine import weights as weights_module
from powerinfer_tools.engine.from_disk import FromDisk, RamOptions
from powerinfer_tools.engine.neurons_on_disk import NeuronsOnDisk
from powerinfer_tools.engine.weights_on_disk import Budget
from powerinfer_tools.errors import ModelError, ProfileError
from powerinfer_tools.measure.synthetic.shapes import SHAPES
from powerinfer_tools.measure.synthetic.sparse import Sparsity, write_sparse
from powerinfer_tools.model.loading import Model, load_model
from powerinfer_tools.stages.convert.conversion import ConvertOptions, convert
from powerinfer_tools.stages.threshold import ThresholdOptions, run_threshold
from predicted_models import TEXT, profiled
from small_plans import plan_for
from tiny_models import CASES, make_tiny_model

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


@pytest.fixture(scope="module")
def thresholded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A split file with SiLU whose layers all have thresholds, and no hot neurons."""
    folder = tmp_path_factory.mktemp("thresholded")
    tiny = make_tiny_model(folder, replace(CASES["llama"], neurons=768, layers=3))
    profile, plan, split = profiled(folder, tiny), folder / "plan.json", folder / "tiny.powerinfer.gguf"
    report = run_threshold(
        ThresholdOptions(tiny.path, profile, TEXT, folder / "tiny.thresholds.safetensors", 0.5, 64, 4, 1)
    )
    plan_for(Profile.load(profile), [0] * 3, mode="thresholded", group=16, width=tiny.spec.width).save(plan)
    convert(ConvertOptions(tiny.path, profile, plan, split, quant="F32", thresholds=Path(report.output)))
    return split


@pytest.fixture
def budget(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Every model runs from disk, with as much of its neurons in memory as the test says."""
    wanted = {"share": 1.0, "more": float(4 << 20)}

    def opened(
        model: Model, pool: Pool, options: RamOptions, *, batch: int, mode: str | None, **_: object
    ) -> FromDisk:
        disk = NeuronsOnDisk(model, pool, mode)
        nbytes = int(disk.whole_bytes * wanted["share"] + wanted["more"])
        disk.prepare(nbytes)
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
        assert report.ahead > 0 or share > 0.5
        assert report.ahead_used == report.ahead or mode == "predicted"
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


def test_thresholded_neurons_come_from_disk(
    thresholded: Path, budget: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is read is named by the factor that is in memory; the same bits for five budgets."""
    monkeypatch.setattr(neurons_on_disk, "_SLACK", 0)
    monkeypatch.setattr(neurons_on_disk, "_TRIED", 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights_module, "open_from_disk", lambda *_, **__: None)
        expected, _ = logits(thresholded)
    read = []
    for share in (0.4, 0.5, 0.6, 0.8, 1.1):
        budget.update(share=share, more=0.0)
        got, engine = logits(thresholded)
        assert np.array_equal(got, expected)
        read.append(engine.final.read_bytes)  # type: ignore[attr-defined]
    assert read[0] > 0
    assert read[-1] == 0


def logits(path: Path) -> tuple[np.ndarray, Engine]:
    """A prompt, and tokens one by one; the engine is closed."""
    engine, tokens = Engine(load_model(path), threads=2, mode="thresholded", batch=12), range(3, 27)
    try:
        rows = [engine.prefill(tokens[:12]).copy(), *(engine.decode(token).copy() for token in tokens[12:])]
        engine.final = engine.report().disk  # type: ignore[attr-defined]
        return np.stack(rows), engine
    finally:
        engine.close()


def test_neurons_in_use_are_learnt(path: Path, tmp_path: Path, budget: dict[str, float]) -> None:
    """From disk and in memory the same counts, in the source's order; they add up from run to run."""
    learnt = {share: tmp_path / f"learnt-{share}.safetensors" for share in (0.4, 1.1)}
    for share, file in learnt.items():
        budget["share"] = share
        for count in (20, 9):
            with powerinfer.load(path, threads=2, mode="gate-first", learn=file) as model:
                model.logits(TOKENS[:count])
    profiles = [Profile.load(file) for file in learnt.values()]
    split = load_model(path).split
    assert split is not None
    for profile in profiles:
        assert (profile.tokens, len(profile.corpus)) == (29, 2)
        assert profile.fingerprint == split.source_fingerprint
        for layer in split.layers:
            assert np.array_equal(profile.counts(layer.index), profiles[0].counts(layer.index))
            frequency = profile.frequency(layer.index)[layer.order]
            assert 0.05 < frequency.mean() < 0.15
            assert frequency[:2048].sum() > 2 * frequency[2048:].sum()
    for mode, device, why in (
        ("predicted", "none", "a layer is predicted"),
        ("gate-first", "cpu", "--device"),
    ):
        with pytest.raises(ProfileError, match=why):
            powerinfer.load(path, mode=mode, device=device, learn=tmp_path / "no")  # type: ignore[arg-type]
