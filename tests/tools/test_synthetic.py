"""Synthetic sparse models fire as often as was asked; the FFN benchmark measures what it says."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from powerinfer_formats.file_types import file_type_name, file_type_number
from powerinfer_formats.gguf_reader import GGUFFile
from powerinfer_formats.split_layout import predictor_names
from powerinfer_kernels import Pool, RowType, row_bytes
from powerinfer_tools.engine import Engine
from powerinfer_tools.errors import HardwareError, ModelError
from powerinfer_tools.measure import ffn_speedup as ffn_benchmarking
from powerinfer_tools.measure import random_ffns as ffn_layers
from powerinfer_tools.measure.synthetic.cache import Request, cached, clear
from powerinfer_tools.measure.synthetic.models import TYPES, write_synthetic
from powerinfer_tools.measure.synthetic.recurrent import Recurrence
from powerinfer_tools.measure.synthetic.shapes import SHAPES, Shape
from powerinfer_tools.measure.synthetic.sparse import (
    OVERSHOOT,
    SPARSE_TYPES,
    Sparsity,
    predictor_rank,
    write_sparse,
)
from powerinfer_tools.model.loading import load_model

SMALL = Shape("llama", 3, 256, 4, 2, 64, 640, 512, 1e4, tied=True)
SMALL_OPT = Shape("opt", 3, 256, 4, 4, 64, 640, 512, 1e4, 100, tied=True, biases="all")
TOKENS = [int(t) for t in np.random.default_rng(0).integers(3, 512, 40)]


def logits(path: Path, mode: str) -> tuple[np.ndarray, float]:
    """Logits of every token, decoded one by one, and the density."""
    engine = Engine(load_model(path), threads=2, context=64, mode=mode)
    try:
        rows = np.array([engine.decode(token).copy() for token in TOKENS])
        return rows, engine.stack.density()
    finally:
        engine.close()


#: A state space, an FFN and attention; time mixing; norms inside of blocks.
MIXED = {
    "nemotron_h": replace(
        SHAPES["nemotron-h-8b"],
        layers=3,
        width=256,
        heads=4,
        kv_heads=2,
        head_dim=64,
        neurons=640,
        vocabulary=512,
        context=64,
        recurrence=Recurrence("M-*", 512, 32, 8, groups=2),
    ),
    "rwkv7": replace(
        SHAPES["rwkv7-world-2.9b"],
        layers=2,
        width=256,
        neurons=640,
        vocabulary=512,
        context=64,
        recurrence=Recurrence(state=64, ranks=(16, 16, 8, 24)),
    ),
    "bitnet": replace(
        SHAPES["bitnet-2b-4t"],
        layers=2,
        width=256,
        heads=4,
        kv_heads=2,
        head_dim=64,
        neurons=640,
        vocabulary=512,
    ),
}


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("row_type", ["Q4_0", "Q4_K_M"])
def test_models_without_attention_in_some_layers(name: str, row_type: str, tmp_path: Path) -> None:
    """They open and compute what is finite, and some of the neurons are exactly zero."""
    path = tmp_path / "mixed.gguf"
    assert write_synthetic(path, name, MIXED[name], row_type) == path.stat().st_size
    assert load_model(path).exact_zeros
    engine, active = Engine(load_model(path), threads=1, context=64, batch=64), list[float]()
    engine.absorb(TOKENS, lambda layer, normed, hidden: active.append(float((hidden != 0).mean())))
    assert np.isfinite(engine.decode(5)).all()
    engine.close()
    assert len(active) == {"nemotron_h": 1}.get(name, 2)
    assert all(0.02 < share < 0.98 for share in active)


def test_norms_inside_of_blocks_have_no_split_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="without --density, its own activation makes zeros"):
        write_sparse(tmp_path / "none.gguf", "bitnet", MIXED["bitnet"], "Q4_0", Sparsity(0.1))


@pytest.mark.parametrize("row_type", SPARSE_TYPES)
@pytest.mark.parametrize("density", [0.05, 0.1, 0.3, 0.5])
def test_the_density_is_what_was_asked(row_type: str, density: float, tmp_path: Path) -> None:
    """640 neurons × 3 layers × 40 tokens: the neurons' draws alone spread by √(ρ(1−ρ)/1920), 0.011 at most;
    rounding the shift to the row type moves it by a step."""
    path = tmp_path / "sparse.gguf"
    assert write_sparse(path, "small", SMALL, row_type, Sparsity(density)) == path.stat().st_size
    dense, _ = logits(path, "dense")
    sparse, measured = logits(path, "gate-first")
    assert np.isfinite(dense).all()
    np.testing.assert_array_equal(sparse, dense)
    assert measured == pytest.approx(density, abs=0.02 + 0.1 * density)


def test_the_density_holds_in_deep_layers(tmp_path: Path) -> None:
    """What blocks add to the constant block has no common direction that would add up over layers."""
    path = tmp_path / "deep.gguf"
    write_sparse(path, "deep", replace(SMALL, layers=32, width=512, heads=8), "Q4_0", Sparsity(0.1))
    _, measured = logits(path, "gate-first")
    assert measured == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize("row_type", ["Q4_0", "F32"])
def test_an_ffn_without_gate_fires_by_its_biases(row_type: str, tmp_path: Path) -> None:
    """OPT's form: two matrices, and a bias for each neuron; the same bits in the modes that are exact, and
    somewhat more neurons in the one that is not."""
    path = tmp_path / "opt.gguf"
    assert write_sparse(path, "opt", SMALL_OPT, row_type, Sparsity(0.1)) == path.stat().st_size
    dense, _ = logits(path, "dense")
    sparse, measured = logits(path, "gate-first")
    np.testing.assert_array_equal(sparse, dense)
    assert measured == pytest.approx(0.1, abs=0.03)
    predicted, named = logits(path, "predicted")
    assert not np.array_equal(predicted, dense)
    assert named == pytest.approx(OVERSHOOT * 0.1, abs=0.03)


def with_thresholds(source: Path, target: Path, value: float) -> Path:
    """The same file with every predictor's thresholds set to ``value``."""
    data = bytearray(source.read_bytes())
    gguf = GGUFFile.open(source)
    for layer in range(SMALL.layers):
        found = np.frombuffer(gguf.tensor(predictor_names(layer)[2]), np.uint8)
        start = data.find(found.tobytes())
        assert data.count(found.tobytes()) == 1
        data[start : start + len(found)] = np.full(SMALL.neurons, value, "<f4").tobytes()
    gguf.close()
    target.write_bytes(data)
    return target


@pytest.mark.parametrize("row_type", SPARSE_TYPES)
def test_predicted_mode(row_type: str, tmp_path: Path) -> None:
    """A few more neurons than were asked to fire, and most of those that do; all of them where the thresholds
    are low, and then the bits of dense; none where they are high. A batch of tokens gives the bits of single
    ones."""
    path = tmp_path / "sparse.gguf"
    write_sparse(path, "small", SMALL, row_type, Sparsity(0.2))
    dense, _ = logits(path, "dense")
    predicted, density = logits(path, "predicted")
    assert density == pytest.approx(OVERSHOOT * 0.2, abs=0.04)
    assert not np.array_equal(predicted, dense)
    engine = Engine(load_model(path), threads=1, context=64, mode="predicted", check_recall=True)
    engine.prefill(TOKENS)
    recall = engine.report().recall
    engine.close()
    assert recall is not None
    assert 0.85 < recall < 1
    everything, density = logits(with_thresholds(path, tmp_path / "low.gguf", -3e38), "predicted")
    np.testing.assert_array_equal(everything, dense)
    assert density == 1.0
    nothing, density = logits(with_thresholds(path, tmp_path / "high.gguf", 3e38), "predicted")
    assert density == 0.0
    assert np.isfinite(nothing).all()
    for threads, batch in ((1, 64), (2, 7), (3, 2)):
        engine = Engine(load_model(path), threads=threads, context=64, batch=batch, mode="predicted")
        np.testing.assert_array_equal(engine.prefill(TOKENS), predicted[-1])
        engine.close()


def test_predictors_have_their_share_of_the_weights() -> None:
    for name, shape in SHAPES.items():
        if shape.experts:
            continue
        attention = 2 * (shape.heads + shape.kv_heads) * shape.head_dim * shape.width
        weights = attention + (3 if shape.spec.gated else 2) * shape.neurons * shape.width
        predictor = predictor_rank(shape) * (shape.width + shape.neurons)
        assert 0.05 < predictor / weights < 0.09, name


def test_skew_makes_some_neurons_busy() -> None:
    rng = np.random.default_rng(1)
    even, skewed = (Sparsity(0.1, skew).rates(rng, 4000) for skew in (0.0, 1.0))
    assert np.allclose(even, 0.1)
    assert skewed.mean() == pytest.approx(0.1, abs=0.02)
    assert (np.diff(skewed) <= 0).all()
    assert skewed[:400].sum() > 0.6 * skewed.sum()


def test_the_cache_keeps_and_clears(tmp_path: Path) -> None:
    request = Request("smollm2-135m", "Q8_0", 1, Sparsity(0.2))
    path, written = cached(request, tmp_path)
    assert written
    stamp, size = path.stat().st_mtime_ns, path.stat().st_size
    assert cached(request, tmp_path) == (path, False)
    assert path.stat().st_mtime_ns == stamp
    (tmp_path / "other.gguf").write_bytes(b"not ours")
    assert clear(tmp_path) == size
    assert [entry.name for entry in tmp_path.iterdir() if entry.is_file()] == ["other.gguf"]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda _: Request("gpt-5"), "mistral-7b"),
        (lambda _: Request("mistral-7b", "Q1_0"), "Q4_0"),
        (lambda _: Request("mistral-7b", layers=33), "32 layers"),
        (lambda path: write_sparse(path, "x", SMALL, "Q4_K", Sparsity(0.1)), "Q4_K"),
        (lambda path: write_sparse(path, "x", SMALL, "Q4_0", Sparsity(1.0)), "density"),
        (lambda path: write_sparse(path, "x", SMALL, "Q4_0", Sparsity(0.1, float("nan"))), "skew"),
    ],
)
def test_what_cannot_be_made_is_refused(make: object, said: str, tmp_path: Path) -> None:
    assert callable(make)
    with pytest.raises(ModelError, match=said):
        make(tmp_path / "none.gguf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("row_type", TYPES)
def test_every_type_has_a_label(row_type: str) -> None:
    assert file_type_name(file_type_number(row_type)) is not None


def test_shapes_are_whole() -> None:
    for name, shape in SHAPES.items():
        assert shape.heads % shape.kv_heads == 0, name
        assert shape.width % 32 == shape.neurons % 32 == 0, name


@pytest.mark.parametrize("row_type", [RowType.Q4_0, RowType.Q6_K, RowType.F16], ids=lambda t: t.name)
def test_ffn_rows(row_type: RowType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ffn_layers, "_DEFEAT_CACHES", 1 << 20)
    with Pool(2) as pool:
        rows = ffn_benchmarking.bench_ffn(pool, 256, 512, row_type, [0.1, 1.0], seconds=0.01)
    assert [(row.mode, row.density) for row in rows] == [
        ("dense", 1.0),
        ("predicted", 0.1),
        ("predicted", 1.0),
        ("gate-first", 0.1),
        ("gate-first", 1.0),
        ("thresholded", 0.1),
        ("thresholded", 1.0),
    ]
    assert rows[0].speedup == rows[0].low == rows[0].high == 1.0
    for row in rows:
        assert row.low <= row.speedup <= row.high
        assert row.gbps > 0


@pytest.mark.parametrize("gated", [True, False])
def test_ffn_of_every_neuron_computes_the_same(monkeypatch: pytest.MonkeyPatch, gated: bool) -> None:
    """All neurons selected, all of them active: predicted has the bits of a split file's dense form."""
    monkeypatch.setattr(ffn_layers, "_DEFEAT_CACHES", 1 << 20)
    types = (RowType.Q8_0, RowType.Q6_K, RowType.Q8_0)
    shape = ffn_layers.FFNShape(256, 512, types if gated else types[1:])
    with Pool(1) as pool:
        layers = ffn_layers.FFNLayers(pool, shape, "dense-rows", ffn_benchmarking.CURVE_MODES)
        layers.seconds("predicted", 1.0)
        predicted = layers._out.copy()
        layers.seconds("gate-first", 1.0)
        assert (layers._out != predicted).any()  # there the drawn values take the place of the gate
        layers.seconds("dense-rows", 1.0)
        assert np.abs(predicted).max() > 0
        np.testing.assert_array_equal(layers._out.view(np.uint32), predicted.view(np.uint32))
        assert layers.touched("predicted", 0.5) == layers.touched("dense-rows", 1.0) / 2
        sizes = [512 * row_bytes(kind, 256) for kind in shape.types]
        assert layers.touched("gate-first", 0.5) == sizes[0] + sum(sizes[1:]) / 2


@pytest.mark.parametrize("density", [0.25, 1.0])
def test_ffn_thresholded_computes_the_neurons_that_were_drawn(
    monkeypatch: pytest.MonkeyPatch, density: float
) -> None:
    """Those whose known factor, here the drawn 1, is above the threshold: Σ 1 · up · down over them."""
    monkeypatch.setattr(ffn_layers, "_DEFEAT_CACHES", 1 << 18)
    shape = ffn_layers.FFNShape(64, 96, (RowType.F32,) * 3)
    with Pool(1) as pool:
        layers = ffn_layers.FFNLayers(pool, shape, "dense-rows", ("thresholded",))
        made = []
        monkeypatch.setattr(layers, "_rows", lambda *_, **__: made.append(rows(len(made))) or made[-1])
        layers._programs = layers._write(("thresholded",))
        layers.seconds("thresholded", density)
    drawn = layers._selects[-1][0] == 1
    assert drawn.sum() == round(density * 96)
    _, up, down = (some.view(np.float32).astype(np.float64) for some in made)
    expected = (up[drawn] @ layers._x[0].astype(np.float64)) @ down[drawn]
    np.testing.assert_allclose(layers._out[0], expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def rows(seed: int) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal((96, 64)).astype(np.float32)
    return values.view(np.uint8).reshape(96, -1)


def test_ffn_that_does_not_fit_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ffn_layers.detect, "available_ram_bytes", lambda: 1 << 20)
    with Pool(1) as pool, pytest.raises(HardwareError, match="bytes of memory are free"):
        ffn_benchmarking.bench_ffn(pool, 256, 512, RowType.Q4_0, [0.5])
