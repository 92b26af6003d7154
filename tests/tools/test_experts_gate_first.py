"""Mode gate-first inside experts: neurons that are zero are not read, and every bit is that of mode dense."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from powerinfer_kernels import available_isas
from powerinfer_tools.engine import Engine
from powerinfer_tools.errors import ModelError
from powerinfer_tools.measure.synthetic.cache import Request
from powerinfer_tools.measure.synthetic.models import write_synthetic
from powerinfer_tools.measure.synthetic.shapes import Shape
from powerinfer_tools.measure.synthetic.sparse import Sparsity
from powerinfer_tools.model.loading import load_model

SHAPE = Shape("llama", 2, 128, 2, 1, 64, 96, 300, 1e4, tied=True, experts=6, used=2, activation="relu")
TOKENS = [(7 * i + 3) % 300 for i in range(40)]


def written(folder: Path, row_type: str = "Q4_0", density: float | None = 0.4, **changes: object) -> Path:
    path = folder / "experts.gguf"
    write_synthetic(path, "experts", replace(SHAPE, **changes), row_type, density=density)  # type: ignore[arg-type]
    return path


def decoded(path: Path, mode: str, *, threads: int = 2, isa: str | None = None) -> tuple[np.ndarray, Engine]:
    """Logits after a prompt of 30 tokens and after each of the others, and the engine, closed."""
    engine = Engine(load_model(path), threads=threads, isa=isa, mode=mode)
    with engine:
        rows = [engine.prefill(TOKENS[:30]).copy(), *(engine.decode(one).copy() for one in TOKENS[30:])]
        engine.report()
        return np.stack(rows).view(np.uint32), engine


@pytest.mark.parametrize(
    ("row_type", "density", "changes"),
    [
        ("Q4_0", 0.4, {}),
        ("Q4_1", None, {"activation": "drelu"}),
        ("Q8_0", 0.2, {"width": 160, "architecture": "qwen3moe", "activation": "relu2"}),
        ("Q6_K", 0.4, {"width": 256, "neurons": 256}),
    ],
)
def test_bits_are_those_of_dense(
    row_type: str, density: float | None, changes: dict[str, object], tmp_path: Path
) -> None:
    path = written(tmp_path, row_type, density, **changes)
    expected, _ = decoded(path, "dense")
    for threads, isa in ((1, None), (3, None), *((2, isa) for isa in available_isas())):
        got, _ = decoded(path, "gate-first", threads=threads, isa=isa)
        np.testing.assert_array_equal(got, expected)


def test_what_is_read_is_said(tmp_path: Path) -> None:
    """Two of six experts, and two of five of their neurons; fewer bytes than whole experts."""
    reports = {}
    for mode in ("dense", "gate-first"):
        with Engine(load_model(written(tmp_path)), threads=1, mode=mode) as engine:
            for token in TOKENS:
                engine.decode(token)
            reports[mode] = engine.report()
    assert reports["dense"].density == pytest.approx(2 / 6)
    assert reports["gate-first"].density == pytest.approx(2 / 6 * 0.4, rel=0.15)
    assert reports["gate-first"].bytes_per_token < 0.9 * reports["dense"].bytes_per_token
    assert reports["gate-first"].mode == "gate-first"


@pytest.mark.parametrize(
    ("row_type", "density", "changes"), [("Q4_0", None, {"activation": None}), ("F16", 0.4, {})]
)
def test_experts_whose_neurons_cannot_be_picked(
    row_type: str, density: float | None, changes: dict[str, object], tmp_path: Path
) -> None:
    model = load_model(written(tmp_path, row_type, density, **changes))
    with pytest.raises(ModelError, match=r"experts run in mode dense alone.*gate-first needs"):
        Engine(model, mode="gate-first")
    model.close()


def test_synthetic_shapes_of_which_some_neurons_fire() -> None:
    for sparsity in (Sparsity(0.6), Sparsity(0.4, 0.5)):
        with pytest.raises(ModelError, match="at most half"):
            Request("smallthinker-4b-a0.6b", sparsity=sparsity)
    assert Request("smallthinker-4b-a0.6b", sparsity=Sparsity(0.4)).file_name.endswith("v7.gguf")
