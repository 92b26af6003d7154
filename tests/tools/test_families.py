"""Families whose FFN, norms or blocks differ from llama's: the whole way from a profile to a run."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine_logits import logits
from plan_cases import granted
from powerinfer_formats.errors import FormatError
from powerinfer_formats.gguf_reader import GGUFFile
from powerinfer_formats.gguf_writer import GGUFWriter
from powerinfer_formats.predictors import Predictors
from powerinfer_formats.profile import Profile
from powerinfer_formats.split import SplitFile
from powerinfer_formats.split_layout import bundle_name
from powerinfer_kernels import available_isas
from powerinfer_tools.engine import Engine
from powerinfer_tools.engine.observation import counters
from powerinfer_tools.errors import ModelError
from powerinfer_tools.measure.hardware.presets import PC_LOW
from powerinfer_tools.model.loading import load_model
from powerinfer_tools.model.reference import forward
from powerinfer_tools.model.shapes import shape_of_model
from powerinfer_tools.stages.convert.conversion import ConvertOptions, convert
from powerinfer_tools.stages.plan.planner import PlanOptions
from powerinfer_tools.stages.plan.request import make_plan
from powerinfer_tools.stages.profile import ProfileOptions, run_profile
from powerinfer_tools.stages.train import TrainOptions, run_train
from small_plans import plan_for
from tiny_models import CASES, make_tiny_model

TEXT = "the cat sat on the mat and the dog sat on the log; a quick brown fox jumps over the lazy dog. " * 40
#: ReLU families: with and without gate, bias, parallel blocks, whole blocks of columns.
RELU_CASES = (
    "llama-fatrelu",
    "bamboo",
    "bamboo-Q4_1",
    "arcee",
    "opt",
    "opt-Q4_0",
    "falcon-relu",
    "falcon-Q8_0",
    "nemotron",
)


class Pipeline:
    """All files of one tiny model, made by the stages themselves."""

    def __init__(self, folder: Path, case: str) -> None:
        self.folder, self.tiny = folder, make_tiny_model(folder, CASES[case])
        text = folder / "text.txt"
        text.write_text(TEXT)
        self.profile = folder / "tiny.profile.safetensors"
        trace = folder / "tiny.trace.zst"
        run_profile(
            ProfileOptions(
                self.tiny.path, (text,), self.profile, window=64, threads=1, trace=1000, trace_output=trace
            )
        )
        self.predictors = folder / "tiny.predictors.safetensors"
        row_type = "F32" if self.tiny.spec.width % 32 else "Q8_0"
        self.trained = run_train(
            TrainOptions(self.tiny.path, trace, self.predictors, row_type=row_type, budget=1.0, recall=0.999)
        )
        self.plan = folder / "tiny.plan.json"
        model = load_model(self.tiny.path)
        options = PlanOptions(objective="frequency", context=64, group=16, batch=16)
        budgets = granted(230_000)
        make_plan(shape_of_model(model), Profile.load(self.profile), PC_LOW, budgets, options).save(self.plan)
        self.split = self._convert(self.plan, "planned")
        cold = folder / "cold.plan.json"
        layers, width = self.tiny.spec.layers, self.tiny.spec.width
        profile = Profile.load(self.profile)
        plan_for(profile, [0] * layers, mode="gate-first", group=16, width=width).save(cold)
        self.cold = self._convert(cold, "cold")

    def _convert(self, plan: Path, name: str) -> Path:
        output = self.folder / f"{name}.powerinfer.gguf"
        convert(ConvertOptions(self.tiny.path, self.profile, plan, output, predictors=self.predictors))
        return output


@pytest.fixture(scope="module", params=RELU_CASES)
def pipeline(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return Pipeline(tmp_path_factory.mktemp("pipeline"), request.param)


def test_gate_first_has_the_bits_of_dense(pipeline: Pipeline) -> None:
    """Whatever the plan placed, and for prompts (all rows are read) as for decoding (active rows alone)."""
    tokens = pipeline.tiny.tokens(24)
    for path in (pipeline.split, pipeline.cold):
        expected = logits(path, tokens, prompt=12, mode="dense")
        for options in ({"threads": 3}, *({"isa": isa} for isa in available_isas())):
            assert np.array_equal(logits(path, tokens, prompt=12, mode="gate-first", **options), expected)


def test_the_split_file_is_the_model(pipeline: Pipeline) -> None:
    """The engine over the split file against the float64 reference over the same file: activations of 8 bits
    for quantised rows, else the cache's half precision."""
    tokens = pipeline.tiny.tokens(20)
    expected = forward(load_model(pipeline.split), tokens)[7:]
    relative = np.sqrt(np.mean((logits(pipeline.split, tokens, prompt=8) - expected) ** 2))
    relative /= np.sqrt(np.mean(expected**2))
    products = 7 * pipeline.tiny.spec.layers + 1
    assert relative <= (2.0**-10 if pipeline.tiny.spec.row_type == "F32" else 0.01 * np.sqrt(products))


def test_the_hot_side_computes_the_same(pipeline: Pipeline) -> None:
    """The hot part by torch, beside attention where the blocks are parallel; the order of sums differs, and
    may tip an 8-bit rounding."""
    assert any(layer.hot_neurons for layer in SplitFile.open(pipeline.split).layers)
    tokens = pipeline.tiny.tokens(20)
    expected = logits(pipeline.split, tokens, prompt=8)
    bound = 2000 * np.finfo(np.float32).eps if pipeline.tiny.spec.row_type == "F32" else 0.03
    for mode in ("dense", "gate-first"):
        got = logits(pipeline.split, tokens, prompt=8, device="cpu", mode=mode)
        assert np.abs(got - expected).max() <= bound * np.abs(expected).max()
        assert np.array_equal(got, logits(pipeline.split, tokens, prompt=8, device="cpu", mode=mode))


def test_predictors_leave_out_only_what_they_miss(pipeline: Pipeline) -> None:
    """At a recall of 99.9 % little is missing, and what is computed is computed alike."""
    assert Predictors.load(pipeline.predictors).header.target_recall == 0.999
    tokens = pipeline.tiny.tokens(24)
    dense = logits(pipeline.cold, tokens, mode="dense")
    predicted = logits(pipeline.cold, tokens, mode="predicted")
    assert np.array_equal(logits(pipeline.cold, tokens, mode="predicted", threads=3), predicted)
    assert np.abs(predicted - dense).mean() <= 0.1 * np.abs(dense).mean()


def test_rows_of_inactive_neurons_are_not_read(pipeline: Pipeline, tmp_path: Path) -> None:
    """Rows but the first of neurons that stay inactive may hold anything (NaN, too); for tokens that make
    them active it shows."""
    tokens = pipeline.tiny.tokens(3)
    source = load_model(pipeline.tiny.path)
    seen = [counters(source.hyper.neurons, histogram=False) for _ in range(source.hyper.layers)]
    engine = Engine(source, threads=1, observed=seen)
    engine.absorb(tokens)
    engine.close()
    poisoned = tmp_path / "poisoned.powerinfer.gguf"
    data = np.frombuffer(pipeline.cold.read_bytes(), np.uint8).copy()
    split = SplitFile.open(pipeline.cold)
    count = 0
    for layer, counted in zip(split.layers, seen, strict=True):
        start = GGUFFile.open(pipeline.cold).info(bundle_name(layer.index)).offset
        for position in np.flatnonzero(counted.gate_squares[layer.order] == 0):
            record = start + int(position) * layer.layout.record_bytes
            rest = layer.layout.offsets[1]
            data[record + rest : record + layer.layout.record_bytes] = 0xFF
            count += 1
    assert count > split.layers[0].neurons // 20
    poisoned.write_bytes(data.tobytes())
    expected = logits(pipeline.cold, tokens, mode="gate-first")
    assert np.array_equal(logits(poisoned, tokens, mode="gate-first"), expected)
    more = pipeline.tiny.tokens(24)
    right = logits(pipeline.cold, more, mode="gate-first")
    try:
        spoilt = logits(poisoned, more, mode="gate-first")
    except ModelError as error:  # numbers that are not finite are refused
        assert "results are not finite" in str(error)  # noqa: PT017
    else:
        assert not np.array_equal(spoilt, right)


def test_counts_are_those_of_the_reference(tmp_path: Path) -> None:
    """Of an FFN without gate, a neuron is active where its biased up product is positive."""
    tiny = make_tiny_model(tmp_path, CASES["opt"])
    model, tokens = load_model(tiny.path), tiny.tokens(30)
    seen = [counters(model.hyper.neurons, histogram=True) for _ in range(model.hyper.layers)]
    engine = Engine(model, threads=1, observed=seen)
    products: list[np.ndarray] = []
    engine.absorb(tokens, lambda layer, normed, hidden: products.append(hidden.copy()))
    engine.close()
    for counted, hidden in zip(seen, products, strict=True):
        assert np.array_equal(counted.counts, (hidden > 0).sum(axis=0))
        assert np.array_equal(counted.up_squares, np.full(model.hyper.neurons, len(tokens)))
        np.testing.assert_allclose(counted.gate_squares, (hidden.astype(np.float64) ** 2).sum(axis=0), 1e-14)
    densities = [counted.counts.mean() / len(tokens) for counted in seen]
    assert all(0.2 < density < 0.8 for density in densities)


def test_the_cut_is_followed(tmp_path: Path) -> None:
    """A jump at the cut magnifies roundings, so a cut this large is not met to the last digits; ignoring it
    would be far off."""
    tiny = make_tiny_model(tmp_path, replace(CASES["llama-fatrelu"], cut=0.5))
    model, tokens = load_model(tiny.path), tiny.tokens(30)
    hyper = replace(model.hyper, activation="relu", activation_cut=0.0)
    got = logits(tiny.path, tokens, prompt=1)
    near, far = (forward(replace(model, hyper=h), tokens) - got for h in (model.hyper, hyper))
    assert np.sqrt(np.mean(near**2)) < 0.1 * np.sqrt(np.mean(far**2))


@pytest.mark.parametrize("cut", [-0.5, float("nan"), 1e9])
def test_a_cut_out_of_range_is_refused(cut: float, tmp_path: Path) -> None:
    tiny = make_tiny_model(tmp_path, replace(CASES["llama-fatrelu"], cut=cut))
    with pytest.raises(ModelError, match="activation_threshold is"):
        load_model(tiny.path)


def test_positions_end_where_the_table_does(tmp_path: Path) -> None:
    tiny = make_tiny_model(tmp_path, replace(CASES["opt"], context=12))
    model = load_model(tiny.path)
    assert model.hyper.trained_context == 12
    engine = Engine(model, threads=1)
    assert engine.context == 12
    engine.prefill(tiny.tokens(12))
    engine.close()


def with_tensor(path: Path, output: Path, name: str, values: np.ndarray) -> Path:
    """``path`` with one tensor more, or another in the place of one."""
    gguf = GGUFFile.open(path)
    with GGUFWriter(output) as writer:
        writer.copy_metadata(gguf)
        writer.declare(name, 0, values.shape)
        others = [other for other in gguf.tensors if other != name]
        for other in others:
            writer.declare(other, gguf.info(other).row_type, gguf.info(other).shape)
        writer.write(name, values.astype("<f4"))
        for other in others:
            writer.write(other, gguf.tensor(other))
    return output


@pytest.mark.parametrize(
    ("case", "name", "shape", "words"),
    [
        ("llama", "blk.0.ffn_up.bias", (96,), r"unexpected tensor blk\.0\.ffn_up\.bias"),
        ("llama", "blk.0.ffn_down.bias", (64,), r"unexpected tensor blk\.0\.ffn_down\.bias"),
        ("llama", "blk.1.attn_norm.bias", (64,), r"unexpected tensor blk\.1\.attn_norm\.bias"),
        ("opt", "blk.0.ffn_gate.weight", (90, 60), r"unexpected tensor blk\.0\.ffn_gate\.weight"),
        ("opt", "position_embd.weight", (2, 60), "a table of 2 positions is too short"),
        ("opt", "position_embd.weight", (90, 30), "position_embd.weight"),
        ("falcon", "blk.0.attn_qkv.weight", (64, 64), r"blk\.0\.attn_qkv\.weight"),
    ],
)
def test_what_a_family_has_not_is_refused(
    case: str, name: str, shape: tuple[int, ...], words: str, tmp_path: Path
) -> None:
    """A tensor that would be left out of the forward pass, or does not fit it, makes another model."""
    tiny = make_tiny_model(tmp_path, CASES[case])
    changed = with_tensor(tiny.path, tmp_path / "changed.gguf", name, np.zeros(shape, np.float32))
    with pytest.raises((ModelError, FormatError), match=words):
        load_model(changed)


def test_stages_that_need_a_gate_say_so(tmp_path: Path) -> None:
    tiny = make_tiny_model(tmp_path, CASES["falcon"])
    from powerinfer_tools.stages.relufy import RelufyOptions, run_relufy

    with pytest.raises(ModelError, match="have no gate"):
        run_relufy(RelufyOptions(tiny.path, (tmp_path,), tmp_path / "out.gguf"))
