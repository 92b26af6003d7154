"""Every row of the architecture table: the C engine against the float64 reference, in odd sizes."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from engine_logits import logits
from hybrid_families import FAMILIES
from powerinfer_formats.gguf_reader import GGUFFile
from powerinfer_formats.gguf_writer import GGUFWriter
from powerinfer_tools.errors import ModelError
from powerinfer_tools.inspect.families import supported_families
from powerinfer_tools.model.architectures import ARCHITECTURES, REFUSED, architecture
from powerinfer_tools.model.hyperparameter_types import Rope, Yarn
from powerinfer_tools.model.loading import load_model
from powerinfer_tools.model.reference import forward
from powerinfer_tools.model.rotary import RopeFactors, rotary_angles, rotary_tables
from random_families import VOCABULARY, write_random

#: Rows whose files differ in more than a row says have their own (test_hybrid_families.py).
WRITTEN_FROM_ROWS = sorted(ARCHITECTURES.keys() - {family.name for family in FAMILIES.values()})
HALF = 2.0**-11  # unit roundoff of half precision, which keys and values are cached in
TOKENS = [int(token) for token in np.random.default_rng(0).integers(0, VOCABULARY, 20)]


@pytest.mark.parametrize("name", WRITTEN_FROM_ROWS)
def test_the_engine_computes_what_the_reference_does(name: str, tmp_path: Path) -> None:
    """With the cache rounded alike, what is left is float32 rounding, which now and then tips a cached value
    over to its neighbour; a prompt and single tokens."""
    path = write_random(tmp_path / "random.gguf", ARCHITECTURES[name])
    expected = forward(load_model(path), TOKENS, half_cache=True)
    got = logits(path, TOKENS, prompt=9)
    assert np.ptp(expected) > 1
    assert np.abs(got - expected[-len(got) :]).max() <= HALF * np.abs(expected).max()


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "afmoe", "nemotron", "bloom"])
def test_one_layer_is_a_model(name: str, tmp_path: Path) -> None:
    """Sizes divide by nothing here either: heads of 22 values, rows of 60 and 41."""
    path = write_random(tmp_path / "random.gguf", ARCHITECTURES[name], layers=1)
    expected = forward(load_model(path), TOKENS, half_cache=True)
    got = logits(path, TOKENS, prompt=9)
    assert np.abs(got - expected[-len(got) :]).max() <= HALF * np.abs(expected).max()


@pytest.mark.parametrize("name", WRITTEN_FROM_ROWS)
def test_each_row_needs_its_tensors(name: str, tmp_path: Path) -> None:
    """Without the norm of its head, no file opens (a norm without weights is the family's)."""
    spec = ARCHITECTURES[name]
    gguf = GGUFFile.open(write_random(tmp_path / "random.gguf", spec))
    tensors = [tensor for tensor in gguf.tensors if tensor != f"{spec.output_norm}.weight"]
    with GGUFWriter(tmp_path / "less.gguf") as writer:
        writer.copy_metadata(gguf)
        for tensor in tensors:
            writer.declare(tensor, gguf.info(tensor).row_type, gguf.info(tensor).shape)
        for tensor in tensors:
            writer.write(tensor, gguf.tensor(tensor))
    with pytest.raises(Exception, match=spec.output_norm):
        load_model(tmp_path / "less.gguf")


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_families_that_do_not_run_say_why(name: str) -> None:
    with pytest.raises(ModelError, match=rf"^m: models of the architecture '{name}' do not run: \w+"):
        architecture(name, "m")


def test_the_page_of_families_is_what_the_table_says() -> None:
    """``python scripts/families_page.py --write`` writes it."""
    script = Path(__file__).parents[2] / "scripts" / "families_page.py"
    spec = importlib.util.spec_from_file_location("families_page", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text(encoding="utf-8") == module.page()


def test_the_page_of_zeros_names_every_family_that_has_them() -> None:
    text = (Path(__file__).parents[2] / "docs" / "zeros.md").read_text(encoding="utf-8")
    missing = [row.name for row in supported_families() if row.true_zeros and f"`{row.name}`" not in text]
    assert not missing


def test_minicpm_without_its_scales_has_those_of_its_first_models(tmp_path: Path) -> None:
    """12, 1.4 / √layers and 256 / width (arXiv 2404.06395)."""
    gguf = GGUFFile.open(write_random(tmp_path / "random.gguf", ARCHITECTURES["minicpm"]))
    with GGUFWriter(tmp_path / "less.gguf") as writer:
        writer.copy_metadata(
            gguf, without=[f"minicpm.{kind}_scale" for kind in ("embedding", "residual", "logit")]
        )
        for tensor in gguf.tensors:
            writer.declare(tensor, gguf.info(tensor).row_type, gguf.info(tensor).shape)
        for tensor in gguf.tensors:
            writer.write(tensor, gguf.tensor(tensor))
    hyper = load_model(tmp_path / "less.gguf").hyper
    assert hyper.embedding_scale == 12
    assert hyper.residual_scale == pytest.approx(1.4 / hyper.layers**0.5)
    assert hyper.logit_scale == pytest.approx(256 / hyper.width)


def test_yarn_keeps_fast_pairs_and_scales_slow_ones() -> None:
    """arXiv 2309.00071, section 3.2: pairs that turn more than 32 times in the original context stay, those
    that turn less than once are interpolated; transformers' own frequencies between."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "yarn", "factor": 20.0, "original_max_position_embeddings": 4096}
    config = LlamaConfig(
        hidden_size=128, num_attention_heads=1, rope_parameters=rope | {"rope_theta": 10000.0}
    )
    expected, magnitude = ROPE_INIT_FUNCTIONS["yarn"](config, device="cpu")
    ours = Rope("norm", 128, 10000.0, 20.0, yarn=Yarn(4096, 32.0, 1.0), magnitude=magnitude)
    got = rotary_angles(ours, 2, RopeFactors())[1]
    np.testing.assert_allclose(got, expected.double().numpy(), rtol=1e-5)
    plain = rotary_angles(Rope("norm", 128, 10000.0), 2, RopeFactors())[1]
    assert got[0] == plain[0]
    assert got[-1] == pytest.approx(plain[-1] / 20)
    assert rotary_tables(ours, 2, RopeFactors()).cos[0, 0] == np.float32(magnitude)


def test_the_long_table_is_for_contexts_beyond_training(tmp_path: Path) -> None:
    rope = Rope("neox", 16, 10000.0, original=32)
    long, short = np.full(8, 4, np.float32), np.full(8, 2, np.float32)
    factors = RopeFactors(long=long, short=short)
    plain = rotary_angles(rope, 33, RopeFactors())
    np.testing.assert_allclose(rotary_angles(rope, 33, factors), plain / 4)
    np.testing.assert_allclose(rotary_angles(rope, 32, factors), plain[:32] / 2)


@pytest.mark.parametrize("kind", ["dynamic", "su", "ntk"])
def test_rotary_scaling_that_is_not_computed_is_refused(kind: str, tmp_path: Path) -> None:
    gguf = GGUFFile.open(write_random(tmp_path / "random.gguf", ARCHITECTURES["llama"]))
    with GGUFWriter(tmp_path / "scaled.gguf") as writer:
        writer.copy_metadata(gguf)
        writer.add("llama.rope.scaling.type", kind)
        for tensor in gguf.tensors:
            writer.declare(tensor, gguf.info(tensor).row_type, gguf.info(tensor).shape)
        for tensor in gguf.tensors:
            writer.write(tensor, gguf.tensor(tensor))
    with pytest.raises(ModelError, match=f"rotary scaling '{kind}' is not supported"):
        load_model(tmp_path / "scaled.gguf")
