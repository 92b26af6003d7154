"""Files for the original PowerInfer: as it reads them, with the predictors that train made."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from powerinfer_formats.errors import OtherModel
from powerinfer_formats.gguf_reader import GGUFFile
from powerinfer_formats.predictors import LowRank, Predictors, ResidualRelu
from powerinfer_kernels import RowType
from powerinfer_tools.engine import Engine
from powerinfer_tools.errors import ConvertError
from powerinfer_tools.model.loading import load_model
from powerinfer_tools.model.original import above
from powerinfer_tools.model.split_rows import transposed_down
from powerinfer_tools.model.tensors import Norm
from powerinfer_tools.stages.original import refit
from powerinfer_tools.stages.original.export import ExportOptions, export
from powerinfer_tools.stages.profile import ProfileOptions, run_profile
from powerinfer_tools.stages.train import TrainOptions, run_train
from powerinfer_tools.text import Tokenizer
from tiny_models import FAMILY_CASES, TinyModel, make_tiny_model

#: The original reads predictors of layers of more than 1,000 neurons.
SPEC = replace(FAMILY_CASES["llama-relu"], neurons=1056, width=96, heads=6, kv_heads=3)
TEXT = "the cat sat on the mat and the dog sat on the log; a quick brown fox jumps over the lazy dog. " * 60


class Trained:
    """A tiny model with its trace and its predictors."""

    def __init__(self, folder: Path, row_type: str) -> None:
        self.folder = folder
        self.tiny: TinyModel = make_tiny_model(folder, replace(SPEC, row_type=row_type))
        text = folder / "text.txt"
        text.write_text(TEXT)
        self.trace, self.predictors = folder / "tiny.trace.zst", folder / "tiny.predictors.safetensors"
        run_profile(
            ProfileOptions(
                self.tiny.path,
                (text,),
                folder / "tiny.profile.safetensors",
                window=64,
                threads=1,
                trace=700,
                trace_output=self.trace,
            )
        )
        run_train(
            TrainOptions(self.tiny.path, self.trace, self.predictors, row_type="F16", budget=1.0, recall=0.95)
        )

    def options(self, **changes: object) -> ExportOptions:
        made = ExportOptions(self.tiny.path, self.folder / "out.powerinfer.gguf", self.predictors, self.trace)
        return replace(made, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=["F16", "Q4_0", "BF16"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("trained"), request.param)


def logits(path: Path, tokens: list[int], mode: str) -> np.ndarray:
    engine = Engine(load_model(path), threads=1, mode=mode)
    try:
        return np.concatenate([rows.copy() for rows in engine.score(tokens)])
    finally:
        engine.close()


def test_it_has_the_tensors_that_the_original_asks_for(trained: Trained) -> None:
    """Exactly those of its own converter, in types that it computes with; it refuses any other."""
    report = export(trained.options())
    layers, wanted = SPEC.layers, {"token_embd", "output_norm", "output"}
    own = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm")
    ffn = ("ffn_gate", "ffn_up", "ffn_down_t", "fc1", "fc2")
    wanted |= {f"blk.{index}.{name}" for index in range(layers) for name in own + ffn}
    assert Path(report.output).read_bytes()[:8] == b"PWRI\x03\x00\x00\x00"
    with GGUFFile.open(report.output, magics=(b"PWRI",)) as gguf:
        assert set(gguf.tensors) == {f"{name}.weight" for name in wanted}
        assert {RowType(info.row_type).name for info in gguf.tensors.values()} <= {"F32", "F16", "Q4_0"}
        assert gguf.get("powerinfer.sparse_threshold", float) == 0.0
        assert "powerinfer.activation" not in gguf.metadata
        down = gguf.info("blk.1.ffn_down_t.weight")
        assert down.shape == (SPEC.neurons, SPEC.width)
        rank = gguf.info("blk.1.fc1.weight").shape[0]
        assert rank % 32 == 0
        assert gguf.info("blk.1.fc2.weight").shape == (SPEC.neurons, rank)


def test_it_is_the_same_model(trained: Trained) -> None:
    """Dense, as read back: the bits of gate and up, and the down projection within what is reported."""
    report = export(trained.options())
    source, copy = load_model(trained.tiny.path), load_model(report.output)
    assert copy.is_original
    assert copy.hyper.activation == "relu"
    for index, (ours, theirs) in enumerate(zip(source.layers, copy.layers, strict=True)):
        if trained.tiny.spec.row_type != "BF16":
            assert np.array_equal(ours.source_ffn.first.data, theirs.source_ffn.first.data)
        exact, stored = transposed_down(ours.source_ffn), transposed_down(theirs.source_ffn)
        error = np.linalg.norm(exact - stored) / np.linalg.norm(exact)
        assert error == pytest.approx(report.requantization_error[index], rel=1e-3, abs=1e-9)
    tokens = trained.tiny.tokens(40)
    expected, got = logits(trained.tiny.path, tokens, "dense"), logits(Path(report.output), tokens, "dense")
    bound = {"F16": 1e-3, "BF16": 1e-3, "Q4_0": 0.3}[trained.tiny.spec.row_type]
    assert np.abs(got - expected).max() <= bound * np.abs(expected).max()


def test_its_predictors_are_as_good_as_ours(trained: Trained) -> None:
    """As they were measured, on the normalised inputs of the trace and again while the file runs."""
    report = export(trained.options())
    for before, after in zip(report.source_quality, report.quality, strict=True):
        assert after.density == before.density
        assert after.recall == pytest.approx(before.recall, abs=0.02)
        assert after.predicted_density == pytest.approx(before.predicted_density, abs=0.03)
    engine = Engine(load_model(report.output), threads=1, mode="predicted")
    engine.prefill(Tokenizer.from_gguf(engine.model.source).encode(TEXT)[:200])
    wanted = np.mean([quality.predicted_density for quality in report.quality])
    assert engine.report().density == pytest.approx(wanted, abs=0.05)
    engine.close()


@pytest.mark.parametrize("quant", ["F16", "Q4_0"])
def test_all_matrices_of_the_ffn_in_a_type(trained: Trained, quant: str) -> None:
    report = export(trained.options(quant=quant, predictors=None))
    assert report.down_type == quant
    with GGUFFile.open(report.output, magics=(b"PWRI",)) as gguf:
        for kind in ("gate", "up", "down_t"):
            assert RowType(gguf.info(f"blk.0.ffn_{kind}.weight").row_type).name == quant


def test_without_predictors_every_neuron_is_computed(trained: Trained) -> None:
    report = export(trained.options(predictors=None, trace=None))
    tokens = trained.tiny.tokens(40)
    dense = logits(Path(report.output), tokens, "dense")
    assert np.array_equal(logits(Path(report.output), tokens, "predicted"), dense)
    assert (report.quality, report.predictor_ranks) == ((), (32,) * SPEC.layers)


def test_imported_predictors_go_back_as_they_came(trained: Trained) -> None:
    """Its own form needs no trace, and the threshold is the one that was imported."""
    made = Predictors.load(trained.predictors)
    infos = tuple(replace(layer, kind="residual-relu", quality=None) for layer in made.header.layers)
    header = replace(made.header, layers=infos, test_records=0)
    bound = np.full(SPEC.neurons, above(0.375), np.float32)
    layers = [ResidualRelu(layer.inward, layer.outward, bound) for layer in made.layers if layer]
    Predictors(header, tuple(layers)).save(trained.folder / "imported")
    report = export(trained.options(predictors=trained.folder / "imported", trace=None))
    model = load_model(report.output)
    with GGUFFile.open(report.output, magics=(b"PWRI",)) as gguf:
        assert gguf.get("powerinfer.sparse_threshold", float) == 0.375
    for layer, expected in zip(model.split.layers, layers, strict=True):  # type: ignore[union-attr]
        assert layer.predictor is not None
        assert (layer.predictor.threshold == bound).all()
        stored = layer.predictor.inward.view(np.float16).astype(np.float32)
        assert np.array_equal(stored.reshape(expected.inward.shape), expected.inward)
    layers[0] = replace(layers[0], threshold=bound + np.arange(SPEC.neurons, dtype=np.float32))
    Predictors(header, tuple(layers)).save(trained.folder / "uneven")
    with pytest.raises(ConvertError, match="one threshold for all neurons"):
        export(trained.options(predictors=trained.folder / "uneven", trace=None))
    none = replace(infos[0], kind="none", rank=0)
    Predictors(replace(header, layers=(none, *infos[1:])), (None, *layers[1:])).save(trained.folder / "some")
    with pytest.raises(ConvertError, match="of kind none, residual-relu"):
        export(trained.options(predictors=trained.folder / "some"))


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_refitted_scores(kind: str) -> None:
    """Sign for sign what the predictor says of the normalised input, where the size of the residual stream is
    a linear function of it: then nothing is approximated."""
    rng = np.random.default_rng(3)
    width, neurons, rank, count = 24, 50, 5, 400
    weight, bias = rng.uniform(0.5, 2, width).astype(np.float32), rng.normal(size=width).astype(np.float32)
    norm = Norm(kind, weight, bias if kind == "layer" else None)  # type: ignore[arg-type]
    residual = rng.normal(size=(count, width))
    residual[:, 3] += 40 * np.sqrt(width)  # one channel is nearly all of the size
    residual *= rng.uniform(0.1, 30, size=(count, 1))
    centred = residual - residual.mean(axis=1, keepdims=True) if kind == "layer" else residual
    size = np.sqrt(np.mean(centred**2, axis=1, keepdims=True))
    inputs = (centred / size * weight + (0 if norm.bias is None else bias)).astype(np.float32)
    layer = LowRank(
        rng.normal(size=(rank, width)).astype(np.float32),
        rng.normal(size=(neurons, rank)).astype(np.float32),
        (3 * rng.normal(size=neurons)).astype(np.float32),
    )
    scores = inputs @ layer.inward.T @ layer.outward.T - layer.threshold
    made = refit.refit(layer, norm, inputs[:200])
    hidden = np.maximum(residual @ made.inward.T.astype(np.float64), 0)
    theirs = hidden @ made.outward.T
    clear = np.abs(scores) > 0.02 * np.abs(scores).max()
    assert clear.mean() > 0.9
    assert np.array_equal((theirs >= 0)[clear], (scores > 0)[clear])
    quality = refit.judge(made, norm, inputs, scores > 0)
    assert quality.recall > 0.97
    assert quality.precision > 0.97


def test_refusals(trained: Trained, tmp_path: Path) -> None:
    def refused(said: str, **changes: object) -> None:
        with pytest.raises(ConvertError, match=said):
            export(trained.options(output=tmp_path / "no", **changes))
        assert not (tmp_path / "no").exists()

    def other(**changes: object) -> Path:
        return make_tiny_model(tmp_path, replace(SPEC, **changes)).path  # type: ignore[arg-type]

    refused("needs a trace: powerinfer profile -m", trace=None)
    written = export(trained.options()).output
    refused("is a model of the original PowerInfer already", model=Path(written))
    refused("computes llama with relu, this model has silu", model=other(activation="silu"), predictors=None)
    refused("more than 1000 neurons, these have 160", model=other(neurons=160), predictors=None)
    refused("not the width 96", model=other(head_dim=32), predictors=None)
    qwen = replace(FAMILY_CASES["qwen2"], neurons=1056)
    refused(
        "knows llama, bamboo, opt, falcon, not qwen2",
        model=make_tiny_model(tmp_path, qwen).path,
        predictors=None,
    )
    with pytest.raises(OtherModel):
        export(trained.options(model=other(seed=9)))
