"""Models of the original PowerInfer run as they are: exactly by default, and with its own predictors."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine_logits import HALF, MARGIN, logits, margin, near
from original_models import (
    Floats,
    OriginalLayout,
    Predictor,
    Tensors,
    random_predictor,
    rewrite,
    write_original,
)
from powerinfer_formats.gguf_reader import GGUFFile
from powerinfer_formats.profile import Profile
from powerinfer_formats.split import SplitFile
from powerinfer_formats.trace import TraceFile
from powerinfer_kernels import RowType, available_isas
from powerinfer_tools.engine import Engine
from powerinfer_tools.errors import ConvertError
from powerinfer_tools.model.loading import load_model
from powerinfer_tools.model.original import above
from powerinfer_tools.model.reference import forward
from powerinfer_tools.model.shapes import neuron_bytes, shape_of_model
from powerinfer_tools.stages.convert.conversion import ConvertOptions, convert
from powerinfer_tools.stages.profile import ProfileOptions, run_profile
from small_plans import plan_for
from tiny_models import FAMILY_CASES, TinyModel, make_tiny_model

FAMILIES = ("llama-relu", "bamboo", "opt", "falcon-relu")
TOKENS = 24
CORPUS = "the cat sat on the mat; a quick brown fox jumps over the lazy dog. " * 20


@pytest.fixture(scope="module", params=FAMILIES)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make_tiny_model(tmp_path_factory.mktemp("original"), FAMILY_CASES[request.param])


@pytest.mark.parametrize("down_type", [RowType.F32, RowType.F16, RowType.BF16])
def test_runs_exactly(tiny: TinyModel, tmp_path: Path, down_type: RowType) -> None:
    """Gate-first unless asked otherwise, with the bits of dense, and what the same weights give elsewhere."""
    path = write_original(tiny.path, tmp_path / "x.powerinfer.gguf", OriginalLayout(down_type))
    tokens = tiny.tokens(TOKENS)
    model = load_model(path)
    assert (model.is_original, model.is_source) == (True, True)
    assert model.hyper.activation == tiny.spec.activation
    expected = forward(model, tokens, half_cache=True)[TOKENS // 2 - 1 :]
    engine = Engine(model, threads=1)
    assert engine.report().mode == "gate-first"
    engine.close()
    got = logits(path, tokens)
    near(got, expected)
    assert np.array_equal(got, logits(path, tokens, mode="dense"))
    if down_type is RowType.F32:
        near(got, logits(tiny.path, tokens))


@pytest.mark.parametrize("row_type", ["F16", "Q4_0"])
def test_runs_its_two_types(tmp_path: Path, row_type: str) -> None:
    """As its converter and its quantiser write them, every matrix of the type, on every instruction set."""
    spec = replace(FAMILY_CASES["llama-relu"], row_type=row_type, width=96, heads=6, neurons=192)
    tiny = make_tiny_model(tmp_path, spec)
    kind = RowType[row_type]
    path = write_original(tiny.path, tmp_path / "x", OriginalLayout(kind, kind, rank=64))
    tokens = tiny.tokens(TOKENS)
    expected = forward(load_model(path), tokens, half_cache=True)[TOKENS // 2 - 1 :]
    for mode in ("dense", "gate-first", "predicted"):
        first = logits(path, tokens, mode=mode)
        for isa, threads in itertools.product(available_isas(), (1, 3)):
            assert np.array_equal(first, logits(path, tokens, mode=mode, isa=isa, threads=threads))
        if mode != "predicted":
            # Activations have 8 bits beside Q4_0: see test_row_types_agree_with_reference.
            bound = 2 * 0.005 * np.sqrt(7 * spec.layers + 1) if row_type == "Q4_0" else HALF
            assert np.sqrt(np.mean((first - expected) ** 2) / np.mean(expected**2)) <= bound


def never(seed: int) -> Predictor:
    """Every third neuron's score is negative or zero whatever comes: nothing hidden is."""

    def make(layer: int, width: int, neurons: int, rank: int) -> tuple[Floats, Floats]:
        inward, outward = random_predictor(layer + seed, width, neurons, rank)
        outward[::3] = -np.abs(outward[::3])
        return inward, outward

    return make


def with_margin(tiny: TinyModel, path: Path, how: OriginalLayout, tokens: list[int]) -> Path:
    """A model whose scores all keep their distance from the threshold, over the tokens of a forward pass."""
    for seed in range(0, 4000, 100):
        write_original(tiny.path, path, replace(how, predictor=never(seed)))
        if margin(path, tokens) > MARGIN:
            return path
    raise AssertionError("no seed keeps the distance")


@pytest.mark.parametrize("threshold", [None, 0.5])
def test_its_predictors_say_what_is_computed(
    tiny: TinyModel, tmp_path: Path, threshold: float | None
) -> None:
    """Against float64, and with NaN in all rows of neurons that are never named. (Without a threshold those
    are named where nothing hidden is positive, so the rows stay.)"""
    tokens = tiny.tokens(8)
    path = with_margin(
        tiny, tmp_path / "x", OriginalLayout(RowType.F16, rank=33, threshold=threshold), tokens
    )
    model = load_model(path)
    expected = forward(model, tokens, half_cache=True, predicted=True)[3:]
    got = logits(path, tokens, mode="predicted")
    near(got, expected)
    exact = forward(model, tokens, half_cache=True)[3:]
    assert np.abs(expected - exact).max() > 0.05 * np.abs(exact).max()

    def poison(tensors: Tensors) -> None:
        for name, (row_type, shape, data) in tensors.items():
            if "ffn_" in name and len(shape) == 2:
                rows = np.frombuffer(data, np.uint8).reshape(shape[0], -1).copy()
                rows[::3] = 0xFF  # NaN in every float type
                tensors[name] = (row_type, shape, rows.tobytes())

    if threshold is not None:
        poisoned = rewrite(path, tmp_path / "poisoned", poison)
        for threads in (1, 2):
            assert np.array_equal(got, logits(poisoned, tokens, mode="predicted", threads=threads))


def test_a_score_at_the_threshold_counts(tiny: TinyModel, tmp_path: Path) -> None:
    """The original skips what is below its threshold. Nothing hidden is above 0: all scores are 0."""

    def zero(layer: int, width: int, neurons: int, rank: int) -> tuple[Floats, Floats]:
        return np.zeros((rank, width), np.float32), random_predictor(layer, width, neurons, rank)[1]

    tokens = tiny.tokens(TOKENS)
    results = {}
    for threshold in (None, 0.0, above(0.0), -1.0, 1e-30):
        how = OriginalLayout(RowType.F16, threshold=threshold, predictor=zero)
        path = write_original(tiny.path, tmp_path / "x", how)
        results[threshold] = logits(path, tokens, mode="predicted")
    exact = logits(path, tokens)
    for threshold in (None, 0.0, above(0.0), -1.0):
        assert np.array_equal(results[threshold], exact)
    assert not np.array_equal(results[1e-30], exact)


class Stages:
    """Profile, trace and plan of an original model, and split files of it."""

    def __init__(self, source: Path, folder: Path, width: int) -> None:
        self.source, self.folder, self.width = source, folder, width
        text = folder / "corpus.txt"
        text.write_text(CORPUS)
        self.profile, self.trace = folder / "x.profile.safetensors", folder / "x.trace.zst"
        run_profile(
            ProfileOptions(
                source, (text,), self.profile, window=64, threads=1, trace=300, trace_output=self.trace
            )
        )

    def split(self, mode: str, **options: object) -> Path:
        profile = Profile.load(self.profile)
        hot = [16 * (index % 3) for index in range(profile.layers)]
        plan, output = self.folder / f"{mode}.plan.json", self.folder / f"{mode}.split.gguf"
        plan_for(profile, hot, mode=mode, group=16, width=self.width).save(plan)
        self.report = convert(ConvertOptions(self.source, self.profile, plan, output, **options))  # type: ignore[arg-type]
        return output


def test_is_profiled_as_its_source_is(tiny: TinyModel, tmp_path: Path) -> None:
    """The same weights, so the same counts and inputs, but for the order of sums in the down projection."""
    path = write_original(tiny.path, tmp_path / "x", OriginalLayout())
    (tmp_path / "other").mkdir()
    ours, theirs = (
        Stages(tiny.path, tmp_path / "other", tiny.spec.width),
        Stages(path, tmp_path, tiny.spec.width),
    )
    first, second = Profile.load(ours.profile), Profile.load(theirs.profile)
    assert first.tokens == second.tokens > 500
    for layer in range(first.layers):
        np.testing.assert_allclose(first.frequency(layer), second.frequency(layer), atol=0.02)
        np.testing.assert_allclose(first.gate_rms(layer), second.gate_rms(layer), rtol=1e-3)
    with TraceFile(ours.trace) as one, TraceFile(theirs.trace) as other:
        for layer in range(first.layers):
            np.testing.assert_allclose(one.read(layer)[0], other.read(layer)[0], atol=0.01)


@pytest.mark.parametrize("down_type", [RowType.F32, RowType.F16, RowType.Q4_0, RowType.Q5_0])
def test_converts_to_ours(tmp_path: Path, down_type: RowType) -> None:
    """Down rows keep their bits where a split file can hold them; predictors go along, with their form."""
    tiny = make_tiny_model(tmp_path, FAMILY_CASES["llama-relu"])
    path = write_original(tiny.path, tmp_path / "x", OriginalLayout(down_type, RowType.F16, threshold=0.75))
    stages = Stages(path, tmp_path, tiny.spec.width)
    split = stages.split("gate-first")
    tokens = tiny.tokens(TOKENS)
    kept = down_type is not RowType.Q5_0
    assert (max(stages.report.requantization_error) == 0) == kept
    assert stages.report.down_type == (down_type.name if kept else "Q8_0")
    shape = shape_of_model(load_model(path))
    assert neuron_bytes(shape.layers[0]).types[-1] == stages.report.down_type
    assert stages.report.prediction is not None
    assert stages.report.prediction.kinds == ("residual-relu",) * tiny.spec.layers
    for mode in ("dense", "gate-first", "predicted") if kept else ():
        # The same weights in another order: only sums over neurons differ, by their rounding.
        near(logits(split, tokens, mode=mode), logits(path, tokens, mode=mode))
    with GGUFFile.open(split) as gguf:
        assert "powerinfer.sparse_threshold" not in gguf.metadata
        assert not [name for name in gguf.tensors if "fc1" in name or "_t." in name]
    read = SplitFile.open(split)
    assert (read.layers[1].predictor.threshold == np.float32(above(0.75))).all()  # type: ignore[union-attr]
    with pytest.raises(ConvertError, match="split file already"):
        convert(ConvertOptions(split, stages.profile, tmp_path / "gate-first.plan.json", tmp_path / "again"))
    read.close()
