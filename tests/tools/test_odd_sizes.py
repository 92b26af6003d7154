"""Every row type in the families that most files are of, in sizes that suit no kernel: heads of 20 values,
one layer, rows that are no multiple of 256, and so files that mix types as quantisers do."""

from pathlib import Path

import numpy as np
import pytest

from engine_logits import logits
from powerinfer_kernels import available_isas
from powerinfer_tools.measure.synthetic.models import Shape, write_synthetic
from powerinfer_tools.measure.synthetic.random_blocks import BLOCKS
from powerinfer_tools.model.loading import load_model
from powerinfer_tools.model.reference import forward

TOKENS = [(7 * i + 3) % 300 for i in range(11)]


def shape(family: str, row_type: str) -> Shape:
    """One layer; rows of down are whole blocks of the type, others where 160 columns are."""
    neurons = 768 if BLOCKS[row_type].values == 256 else 5 * BLOCKS[row_type].values + 64
    return Shape(
        family,
        layers=1,
        width=160,
        heads=8,
        kv_heads=4,
        head_dim=20,
        neurons=neurons - neurons % max(1, BLOCKS[row_type].values),
        vocabulary=300,
        rope_base=1e4,
        context=64,
        tied=family == "gemma3",
        biases="qkv" if family == "qwen2" else "none",
        window=6 if family == "gemma3" else 0,
    )


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize("row_type", sorted(BLOCKS))
def test_odd_sizes_agree_with_the_reference(family: str, row_type: str, tmp_path: Path) -> None:
    """Tolerance: see test_row_types_agree_with_reference, for eight products; rows of floats round nothing
    but the cache. The bits do not depend on threads, batches and instruction sets."""
    path = tmp_path / "odd.gguf"
    write_synthetic(path, "odd", shape(family, row_type), row_type)
    model = load_model(path)
    assert model.layers[0].source_ffn.down.row_type.name == row_type
    expected = forward(model, TOKENS)[4:]
    got = logits(path, TOKENS, prompt=5)
    relative = np.sqrt(np.mean((got - expected) ** 2) / np.mean(expected**2))
    assert relative <= (2 * 0.005 * np.sqrt(8) if BLOCKS[row_type].values > 1 else 2.0**-9)
    for options in ({"threads": 3}, {"batch": 1}, *({"isa": isa} for isa in available_isas())):
        assert np.array_equal(logits(path, TOKENS, prompt=5, **options), got)
