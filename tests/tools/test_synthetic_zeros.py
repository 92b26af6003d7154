"""Synthetic models with true zeros that mix tokens otherwise than by plain attention: neurons fire as often
as asked, and those that do not are skipped with the same bits."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from powerinfer_tools.engine import Engine
from powerinfer_tools.measure.synthetic.models import write_synthetic
from powerinfer_tools.measure.synthetic.recurrent import Latent, Recurrence
from powerinfer_tools.measure.synthetic.shapes import SHAPES
from powerinfer_tools.measure.synthetic.sparse import OVERSHOOT, Sparsity, write_sparse
from powerinfer_tools.model.loading import load_model

SIZES = {"width": 256, "neurons": 640, "vocabulary": 512, "context": 64}
HEADS = {"heads": 4, "kv_heads": 2, "head_dim": 64}
SHAPE = {
    "plm": replace(
        SHAPES["plm-1.8b"],
        **SIZES,
        layers=2,
        heads=4,
        kv_heads=4,
        head_dim=96,
        latent=Latent(128, 64, 32, 64),
    ),
    "nemotron_h": replace(
        SHAPES["nemotron-h-8b"],
        **SIZES,
        **HEADS,
        layers=5,
        recurrence=Recurrence("M-*M-", 512, 32, 8, groups=2),
    ),
    "rwkv7": replace(
        SHAPES["rwkv7-world-2.9b"],
        **SIZES,
        layers=2,
        recurrence=Recurrence(state=64, ranks=(16, 16, 8, 24)),
    ),
}
MIXTURE = replace(
    SHAPES["nemotron-3-nano-30b-a3b"],
    **SIZES | HEADS | {"neurons": 96},
    layers=4,
    shared=160,
    experts=6,
    used=2,
    recurrence=Recurrence("ME*E", 512, 32, 8, groups=2),
)
TOKENS = [int(t) for t in np.random.default_rng(0).integers(3, 512, 40)]


def logits(path: Path, mode: str) -> tuple[np.ndarray, float]:
    """Logits of every token, decoded one by one, and the density."""
    engine = Engine(load_model(path), threads=2, context=64, mode=mode)
    rows = np.array([engine.decode(token).copy() for token in TOKENS])
    density = engine.stack.density()
    engine.close()
    return rows, density


@pytest.mark.parametrize("density", [0.05, 0.3])
@pytest.mark.parametrize("case", SHAPE)
def test_the_density_is_what_was_asked(case: str, density: float, tmp_path: Path) -> None:
    """Of the layers that have an FFN; predictors name somewhat more neurons."""
    path = tmp_path / "sparse.gguf"
    assert write_sparse(path, case, SHAPE[case], "Q4_0", Sparsity(density)) == path.stat().st_size
    dense, _ = logits(path, "dense")
    sparse, measured = logits(path, "gate-first")
    assert np.isfinite(dense).all()
    np.testing.assert_array_equal(sparse, dense)
    assert measured == pytest.approx(density, abs=0.02 + 0.1 * density)
    _, named = logits(path, "predicted")
    assert named == pytest.approx(OVERSHOOT * density, abs=0.05)


def test_experts_beside_state_spaces(tmp_path: Path) -> None:
    """Neurons of experts that are zero are skipped with the same bits; as many fire as were asked to."""
    path = tmp_path / "experts.gguf"
    assert write_synthetic(path, "mixture", MIXTURE, "Q4_0", density=0.2) == path.stat().st_size
    model = load_model(path)
    assert [facts.ffn for facts in model.hyper.facts] == ["none", "experts", "none", "experts"]
    dense, _ = logits(path, "dense")
    sparse, measured = logits(path, "gate-first")
    assert np.isfinite(dense).all()
    np.testing.assert_array_equal(sparse, dense)
    assert measured == pytest.approx(0.2 * 2 / 6, abs=0.1)


def test_a_shape_with_latent_attention_is_a_source_model(tmp_path: Path) -> None:
    path = tmp_path / "plm.gguf"
    write_synthetic(path, "plm", SHAPE["plm"], "Q4_K_M")
    model = load_model(path)
    assert model.exact_zeros
    assert np.isfinite(logits(path, "dense")[0]).all()
