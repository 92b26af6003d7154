"""NVFP4 rows with a scale of their matrix, as converters write: ``NAME.scale`` beside ``NAME.weight``."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine_logits import logits, of_engine
from fake_gpus import FakeGpu, on
from powerinfer_formats.gguf_reader import GGUFFile
from powerinfer_formats.gguf_writer import GGUFWriter
from powerinfer_kernels import RowType, available_isas, dequantize
from powerinfer_tools.engine import Engine
from powerinfer_tools.errors import ConvertError, ModelError
from powerinfer_tools.measure.synthetic.random_blocks import random_rows
from powerinfer_tools.model.loading import load_model
from powerinfer_tools.model.reference import forward
from powerinfer_tools.stages.convert.conversion import ConvertOptions, convert
from split_models import Prepared
from tiny_models import TinyModel, TinySpec, make_tiny_model

#: Of few bits, so that products with rows are exact in single precision.
SCALES = (0.625, 1.25, 0.875, 1.75)
DENSE = TinySpec(neurons=192, width=128, head_dim=32, layers=2, tied=False)
BIASED = TinySpec(family="qwen2", neurons=192, width=128, head_dim=32, layers=2)
EXPERTS = TinySpec(
    family="qwen2moe", neurons=64, width=128, head_dim=32, layers=2, experts=6, shared_neurons=128
)


def with_scales(source: Path, output: Path, *, plain: bool = False, only: str = "") -> Path:
    """``source`` with all matrices of its layers and its head (those with ``only`` in their name) in NVFP4
    rows, each times a scale, and an input scale beside that; ``plain``: the same values in single
    precision."""
    gguf, rng, made = GGUFFile.open(source), np.random.default_rng(5), dict[str, tuple[int, np.ndarray]]()
    for name, info in gguf.tensors.items():
        taken = name == "output.weight" or (name.startswith("blk.") and "gate_inp" not in name)
        if not taken or len(info.shape) < 2 or only not in name:
            made[name] = info.row_type, np.asarray(gguf.tensor(name))
            continue
        count, rows = int(np.prod(info.shape[:-2])), int(np.prod(info.shape[:-1]))
        data = random_rows(rng, "NVFP4", rows, info.shape[-1])
        scales = rng.choice(SCALES, count).astype(np.float32)
        if plain:
            values = dequantize(data, RowType.NVFP4, rows, info.shape[-1]).reshape(count, -1)
            made[name] = int(RowType.F32), (values * scales[:, None]).reshape(info.shape)
            continue
        base = name.removesuffix(".weight")
        made[name] = int(RowType.NVFP4), data
        made[f"{base}.scale"] = int(RowType.F32), scales
        made[f"{base}.input_scale"] = int(RowType.F32), scales
    with GGUFWriter(output) as writer:
        writer.copy_metadata(gguf)
        for name, (kind, values) in made.items():
            writer.declare(name, kind, gguf.info(name).shape if name in gguf.tensors else values.shape)
        for name, (_, values) in made.items():
            writer.write(name, values)
    return output


@pytest.fixture(scope="module", params=[DENSE, BIASED], ids=lambda spec: spec.family)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """What the files are made of."""
    return make_tiny_model(tmp_path_factory.mktemp("source"), request.param)


def test_the_reference_multiplies_each_matrix(source: TinyModel, tmp_path: Path) -> None:
    scaled, plain = (
        with_scales(source.path, tmp_path / "s"),
        with_scales(source.path, tmp_path / "p", plain=True),
    )
    expected = forward(load_model(plain), list(range(3, 12)))
    assert np.array_equal(forward(load_model(scaled), list(range(3, 12))), expected)


def test_the_engine_agrees_with_the_reference(source: TinyModel, tmp_path: Path) -> None:
    """Tolerance: see test_row_types_agree_with_reference. The same bits for any threads, batch and ISA."""
    path, tokens = with_scales(source.path, tmp_path / "s"), source.tokens(12)
    expected = forward(load_model(path), tokens)[5:]
    got = logits(path, tokens)
    relative = np.sqrt(np.mean((got - expected) ** 2) / np.mean(expected**2))
    assert relative <= 2 * 0.005 * np.sqrt(7 * source.spec.layers + 1)
    for options in ({"threads": 2}, {"batch": 4}, *({"isa": isa} for isa in available_isas())):
        assert np.array_equal(logits(path, tokens, **options), got)


def test_other_rows_have_no_scale(source: TinyModel, tmp_path: Path) -> None:
    """Whatever it may mean there."""
    gguf, path = GGUFFile.open(source.path), tmp_path / "other.gguf"
    with GGUFWriter(path) as writer:
        writer.copy_metadata(gguf)
        for name, info in gguf.tensors.items():
            writer.declare(name, info.row_type, info.shape)
        writer.declare("blk.0.attn_q.scale", 0, (1,))
        for name in gguf.tensors:
            writer.write(name, gguf.tensor(name))
        writer.write("blk.0.attn_q.scale", np.ones(1, np.float32))
    with pytest.raises(ModelError, match=r"unexpected tensor blk\.0\.attn_q\.scale of 1 values"):
        load_model(path)


def test_routed_experts_with_scales(tmp_path: Path) -> None:
    """The products of each expert are times its scales, whatever the threads, batch and ISA."""
    source = make_tiny_model(tmp_path, EXPERTS)
    scaled, plain = (
        with_scales(source.path, tmp_path / "s"),
        with_scales(source.path, tmp_path / "p", plain=True),
    )
    expected = forward(load_model(plain), list(range(3, 9)))
    assert np.array_equal(forward(load_model(scaled), list(range(3, 9))), expected)
    tokens = source.tokens(12)
    expected, got = forward(load_model(scaled), tokens)[5:], logits(scaled, tokens)
    relative = np.sqrt(np.mean((got - expected) ** 2) / np.mean(expected**2))
    assert relative <= 2 * 0.005 * np.sqrt(7 * source.spec.layers + 1)
    for options in ({"threads": 2}, {"batch": 4}, *({"isa": isa} for isa in available_isas())):
        assert np.array_equal(logits(scaled, tokens, **options), got)


def test_neurons_of_experts_with_scales_are_not_left_out(tmp_path: Path) -> None:
    source = make_tiny_model(tmp_path, replace(EXPERTS, activation="relu", row_type="Q8_0"))
    path = with_scales(source.path, tmp_path / "s", only="ffn_gate_exps")
    with pytest.raises(ModelError, match="layer 0 has routed experts whose matrices have a scale each, whi"):
        Engine(load_model(path), threads=1, mode="gate-first")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Attention with scales, an FFN without, and its profile."""

    def made(folder: Path, spec: TinySpec) -> TinyModel:
        tiny = make_tiny_model(folder, spec)
        with_scales(tiny.path, folder / "scaled.gguf", only="attn_").replace(tiny.path)
        return tiny

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("split_models.make_tiny_model", made)
        return Prepared(tmp_path_factory.mktemp("attention"), replace(BIASED, activation="relu"))


@pytest.mark.parametrize("fused", [False, True])
def test_converted_attention_keeps_its_scales(
    prepared: Prepared, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On torch's device, in Triton's interpreter, too: its kernels know no scale, so products are multiplied
    after them. Tolerance: what is rounded flips now and then, see test_conversion."""
    path, tokens = prepared.split([64, 0], attention=[1]), prepared.tiny.tokens(5)
    expected = of_engine(Engine(load_model(path), threads=1), tokens)
    exact = forward(load_model(path), tokens)[1:]
    assert np.abs(expected - exact).max() <= 0.03 * np.abs(exact).max()
    on(monkeypatch, FakeGpu(1 << 30), fused=fused)
    got = of_engine(Engine(load_model(path), threads=1, device="cuda", batch=2, context=8), tokens)
    assert np.abs(got - expected).max() <= 0.02 * np.abs(expected).max()


@pytest.mark.parametrize("spec", [DENSE, EXPERTS], ids=["dense", "experts"])
def test_ffns_and_experts_with_scales_are_not_split(spec: TinySpec, tmp_path: Path) -> None:
    path = with_scales(make_tiny_model(tmp_path, spec).path, tmp_path / "s.gguf")
    with pytest.raises(ConvertError, match="FFNs or experts whose matrices have a scale"):
        convert(ConvertOptions(path, tmp_path / "profile", tmp_path / "plan", tmp_path / "out"))
