"""The engine's forward pass against ``transformers`` and against the float64 reference, per family and row
type."""

from pathlib import Path

import numpy as np
import pytest

from powerinfer_tools.engine import Engine
from powerinfer_tools.model import load_model
from powerinfer_tools.reference_forward import forward
from tiny_models import FAMILY_CASES, TinyModel, make_tiny_model

TOKENS = 40


@pytest.fixture(params=sorted(FAMILY_CASES), scope="module")
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """One float32 model of each family and variant."""
    return make_tiny_model(tmp_path_factory.mktemp("family"), FAMILY_CASES[request.param])


def engine_logits(path: Path, tokens: list[int], **options: object) -> np.ndarray:
    """Logits of every position, (tokens, vocabulary)."""
    engine = Engine(load_model(path), **options)  # type: ignore[arg-type]
    try:
        return np.concatenate([rows.copy() for rows in engine.score(tokens)])
    finally:
        engine.close()


def test_float32_forward_agrees_with_transformers(family: TinyModel) -> None:
    """Both compute in float32: they may differ by rounding alone, a few hundred ulps of the largest logit."""
    tokens = family.tokens(TOKENS)
    expected = family.logits(tokens)
    got = engine_logits(family.path, tokens, threads=1)
    assert np.abs(got - expected).max() <= 2000 * np.finfo(np.float32).eps * np.abs(expected).max()


def test_float32_forward_agrees_with_reference(family: TinyModel) -> None:
    """The same rounding bound against float64."""
    tokens = family.tokens(TOKENS)
    expected = forward(load_model(family.path), tokens)
    got = engine_logits(family.path, tokens, threads=1)
    assert np.abs(got - expected).max() <= 2000 * np.finfo(np.float32).eps * np.abs(expected).max()
