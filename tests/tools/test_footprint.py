"""What a model is counted to take, against what the engine allocates."""

from dataclasses import replace
from pathlib import Path

import pytest

from hybrid_families import FAMILIES, write_random_family
from powerinfer_formats.block_types import TensorType
from powerinfer_tools.engine import Engine
from powerinfer_tools.model.architectures import ARCHITECTURES
from powerinfer_tools.model.counting import Footprint
from powerinfer_tools.model.footprint import ModelFootprint, footprint_of
from powerinfer_tools.model.loading import load_model
from powerinfer_tools.model.matrices import MatrixShape
from powerinfer_tools.model.outline import body_footprint, head_footprint
from powerinfer_tools.model.shapes import shape_of_model
from random_families import write_random
from tiny_models import CASES, make_tiny_model

ROWS = sorted(ARCHITECTURES.keys() - {family.name for family in FAMILIES.values()})


@pytest.mark.parametrize("name", [*ROWS, *FAMILIES])
def test_every_family_takes_what_is_counted(name: str, tmp_path: Path) -> None:
    path = tmp_path / "random.gguf"
    if name in FAMILIES:
        write_random_family(path, FAMILIES[name])
    else:
        write_random(path, ARCHITECTURES[name])
    model = load_model(path)
    counted = footprint_of(model)
    engine = Engine(model, threads=1, context=40, batch=8)
    taken = engine.report().memory
    engine.close()
    assert taken.weights == counted.packed_nbytes
    assert taken.kv_cache == counted.session_bytes(40, "f16")
    assert taken.scratch == counted.scratch_bytes(8, 40)


@pytest.mark.parametrize("case", ["opt", "gemma3", "mixtral-Q4_0", "qwen2moe", "falcon-relu"])
def test_a_shape_is_counted_as_its_model_is(case: str, tmp_path: Path) -> None:
    """Without going through the model: shapes from a table have no file."""
    shape = shape_of_model(load_model(make_tiny_model(tmp_path, CASES[case]).path))
    assert shape.counted is not None
    alone = replace(shape, counted=None)
    body, expected = body_footprint(alone), shape.counted.body
    assert body.token_bytes == expected.token_bytes
    assert head_footprint(alone).token_bytes == shape.counted.head.token_bytes
    assert len(body.ropes) == len(expected.ropes)
    assert body.table_bytes_of(7) == expected.table_bytes_of(7)


def test_rows_that_are_larger_in_memory_than_in_the_file_say_so() -> None:
    """Of three bits in the file, of four with their scales in memory; others are padded to 16 rows."""
    three, float32 = (MatrixShape(kind, 40, 256) for kind in (TensorType.IQ3_XXS, TensorType.F32))
    counted = ModelFootprint(Footprint(matrices=[three]), (), (), Footprint(matrices=[float32]))
    sizes = counted.bytes_by_type
    assert list(sizes) == ["F32", "IQ3_XXS"]
    assert sizes["F32"] == (40 * 1024, 48 * 1024)
    assert sizes["IQ3_XXS"][1] > 1.3 * sizes["IQ3_XXS"][0]
    assert counted.packed_nbytes == sum(packed for _, packed in sizes.values())
