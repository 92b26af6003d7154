"""Synthetic mixtures of experts: routed evenly, and measured by what a token reads."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from powerinfer_formats.gguf_reader import GGUFFile
from powerinfer_tools.engine import Engine
from powerinfer_tools.engine.observation import counters
from powerinfer_tools.errors import ModelError
from powerinfer_tools.measure.bench_rows import bench
from powerinfer_tools.measure.synthetic import cache
from powerinfer_tools.measure.synthetic.cache import Request, weight_bytes
from powerinfer_tools.measure.synthetic.models import write_synthetic
from powerinfer_tools.measure.synthetic.shapes import SHAPES, Shape
from powerinfer_tools.measure.synthetic.sparse import Sparsity
from powerinfer_tools.model.loading import load_model

MIXTRAL = Shape("llama", 8, 256, 4, 2, 64, 64, 400, 1e4, tied=True, experts=8, used=2)
QWEN2 = Shape("qwen2moe", 4, 256, 4, 4, 64, 96, 400, 1e4, biases="qkv", experts=12, used=3, shared=128)
QWEN3 = Shape("qwen3moe", 6, 256, 4, 2, 64, 32, 400, 1e4, experts=16, used=4)
SMALL = {"mixtral": MIXTRAL, "qwen2moe": QWEN2, "qwen3moe": QWEN3}
TOKENS = [int(token) for token in np.random.default_rng(5).integers(3, 400, 200)]


def made(folder: Path, shape: Shape, row_type: str) -> Path:
    path = folder / "made.gguf"
    assert write_synthetic(path, "made", shape, row_type) == path.stat().st_size
    return path


@pytest.mark.parametrize(
    ("name", "row_type"), [("mixtral", "Q4_0"), ("qwen2moe", "Q4_0"), ("qwen3moe", "Q8_0")]
)
def test_tokens_take_all_experts_about_equally_often(name: str, row_type: str, tmp_path: Path) -> None:
    """In every layer, and whatever the token before took. 200 draws of a share p spread by √(p(1−p)/200);
    what the rows' own bias adds is about as much again."""
    shape = SMALL[name]
    seen = [counters(shape.experts, histogram=False) for _ in range(shape.layers)]
    engine = Engine(load_model(made(tmp_path, shape, row_type)), threads=1, context=256, observed=seen)
    repeated, last = 0, np.zeros((shape.layers, shape.experts), bool)
    try:
        for token in TOKENS:
            before = np.array([layer.counts for layer in seen])
            assert np.isfinite(engine.decode(token)).all()
            taken = np.array([layer.counts for layer in seen]) > before
            assert (taken.sum(axis=1) == shape.used).all()
            repeated, last = repeated + int((taken & last).sum()), taken
    finally:
        engine.close()
    share = shape.used / shape.experts
    shares = np.array([layer.counts for layer in seen]) / len(TOKENS)
    assert np.abs(shares - share).max() < 8 * np.sqrt(share * (1 - share) / len(TOKENS))
    assert repeated / (len(TOKENS) - 1) / shape.layers / shape.used == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize("name", SMALL)
def test_rows_count_the_experts_that_are_taken(name: str, tmp_path: Path) -> None:
    """A decoded token reads its own experts; a batch each expert that one of its tokens takes, once."""
    shape = SMALL[name]
    path = made(tmp_path, shape, "Q8_0")
    with GGUFFile.open(path) as gguf:
        sizes = {name: info.nbytes for name, info in gguf.tensors.items()}
    everything = sum(sizes.values())
    experts = sum(size for name, size in sizes.items() if "_exps." in name)
    engine = Engine(load_model(path), threads=1, context=64)
    try:
        pp, tg = bench(engine, prompt=48, generate=4, repetitions=1, bandwidth=1e9)
        totals = [ffn._totals for ffn in engine.stack._written.cold.values()]  # of both tests
        taken = sum(int(experts) / int(passes) for passes, experts in totals)
        report = engine.report()
    finally:
        engine.close()
    assert pp.density == tg.density == report.density == shape.used / shape.experts
    assert report.experts == (shape.used, shape.experts)
    assert report.as_dict()["experts"] == {"used": shape.used, "count": shape.experts}
    assert tg.synthetic
    # A tied embedding is the head, else only one row of it is read; the cache is small beside the weights.
    # Rows of routers and of the shared expert's weight are padded to 16.
    padding = shape.layers * 4 * shape.width * (-shape.experts % 16 + (15 if shape.shared else 0))
    rest = everything - experts - (0 if shape.tied else sizes["token_embd.weight"]) + padding
    assert tg.bytes_per_token == pytest.approx(rest + experts * shape.used / shape.experts, rel=0.01)
    assert taken < shape.experts * shape.layers
    # 48 tokens take nearly all experts between them.
    assert rest + 0.8 * experts < 48 * pp.bytes_per_token < 1.02 * (rest + experts)


def test_published_shapes_have_their_weights() -> None:
    """46.7, 14.3 and 30.5 billion, as published; 8 and more bits of each in Q8_0."""
    for name, billions in {"mixtral-8x7b": 46.7, "qwen1.5-moe-a2.7b": 14.3, "qwen3-30b-a3b": 30.5}.items():
        weights = weight_bytes(SHAPES[name], "F16") / 2e9
        assert weights == pytest.approx(billions, rel=0.005), name


def test_what_has_no_room_is_refused_before_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SHAPES, "small", MIXTRAL)
    one, two = (weight_bytes(replace(MIXTRAL, layers=count), "Q4_0") for count in (1, 2))
    room = one + 4 * (two - one) + 1000

    def disk_of(free: int) -> None:
        monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))

    disk_of(cache.MARGIN + room)
    with pytest.raises(ModelError, match=r"the disk has to spare; ask for fewer layers \(--layers 5\)"):
        Request("small").write(tmp_path / "none.gguf")
    disk_of(1)
    with pytest.raises(ModelError, match="the disk has to spare; take a smaller shape or type"):
        Request("small").write(tmp_path / "none.gguf")
    assert list(tmp_path.iterdir()) == []
    disk_of(cache.MARGIN + room)
    # Experts are read from disk where memory does not hold them.
    monkeypatch.setattr(cache.detect, "available_ram_bytes", lambda: 1)
    assert Request("small", layers=5).write(tmp_path / "some.gguf") > 0


def test_experts_have_no_density_of_neurons() -> None:
    with pytest.raises(ModelError, match="mixtral-8x7b has experts whose activation makes no zeros"):
        Request("mixtral-8x7b", sparsity=Sparsity(0.1))
