"""What a model is counted to take, against what the engine allocates."""

from pathlib import Path

import pytest

from hybrid_families import FAMILIES, write_random_family
from powerinfer_tools.engine import Engine
from powerinfer_tools.model.architectures import ARCHITECTURES
from powerinfer_tools.model.footprint import model_footprint
from powerinfer_tools.model.loading import load_model
from random_families import write_random

ROWS = sorted(ARCHITECTURES.keys() - {family.name for family in FAMILIES.values()})


@pytest.mark.parametrize("name", [*ROWS, *FAMILIES])
def test_every_family_takes_what_is_counted(name: str, tmp_path: Path) -> None:
    path = tmp_path / "random.gguf"
    if name in FAMILIES:
        write_random_family(path, FAMILIES[name])
    else:
        write_random(path, ARCHITECTURES[name])
    model = load_model(path)
    counted = model_footprint(model)
    engine = Engine(model, threads=1, context=40, batch=8)
    taken = engine.report().memory
    engine.close()
    print(name, taken, counted.packed_nbytes, counted.session_bytes(40, "f16"), counted.scratch_bytes(8, 40))
    assert taken.weights == counted.packed_nbytes
    assert taken.kv_cache == counted.session_bytes(40, "f16")
    assert taken.scratch == counted.scratch_bytes(8, 40)
