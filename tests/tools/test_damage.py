"""Weights that are no numbers end every stage that reads them, and files that change under it are noticed."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from powerinfer_formats.errors import FileChanged
from powerinfer_formats.gguf_reader import GGUFFile
from powerinfer_tools.engine import Engine
from powerinfer_tools.engine.damage import require_finite
from powerinfer_tools.errors import ModelError
from powerinfer_tools.model.loading import load_model
from powerinfer_tools.stages.profile import ProfileOptions, run_profile
from tiny_models import FAMILY_CASES, make_tiny_model


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A tiny model with a NaN in a down projection."""
    path = make_tiny_model(tmp_path, FAMILY_CASES["llama"]).path
    with GGUFFile.open(path) as gguf:
        info = gguf.info("blk.0.ffn_down.weight")
    with path.open("r+b") as stream:
        stream.seek(info.offset)
        stream.write(b"\xff" * min(256, info.nbytes))
    return path


def _profile(path: Path) -> None:
    (path.parent / "text.txt").write_text("hello world " * 40)
    run_profile(ProfileOptions(path, (path.parent / "text.txt",), path.parent / "m.profile.safetensors"))


def _decode(path: Path) -> None:
    engine = Engine(load_model(path), threads=1)
    try:
        engine.prefill([1, 2])
    finally:
        engine.close()


@pytest.mark.parametrize("stage", [_profile, _decode])
def test_damaged_weights_end_every_stage(damaged: Path, stage: Callable[[Path], None]) -> None:
    with pytest.raises(ModelError, match=r"weights are damaged \(blk.0.ffn_down.weight holds NaN"):
        stage(damaged)
    assert not (damaged.parent / "m.profile.safetensors").exists()


def test_values_beyond_half_precision_are_no_damage(tmp_path: Path) -> None:
    model = load_model(make_tiny_model(tmp_path, FAMILY_CASES["llama"]).path)
    require_finite(np.full(7, 3e38, np.float32), model)
    with pytest.raises(ModelError, match=r"though its weights are: .* half precision"):
        require_finite(np.array([1.0, np.inf], np.float32), model)
    model.close()


def test_a_source_that_changes_is_noticed(tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path, FAMILY_CASES["llama"]).path
    with GGUFFile.open(path) as gguf:
        gguf.require_unchanged()
        with path.open("r+b") as stream:
            stream.seek(-4, 2)
            stream.write(b"\0\0\0\0")
        with pytest.raises(FileChanged, match="was changed while it was read"):
            gguf.require_unchanged()
    with GGUFFile.open(path) as gguf:
        (tmp_path / "new").write_bytes(path.read_bytes())
        (tmp_path / "new").replace(path)  # another file in its place: the mapped one is whole
        gguf.require_unchanged()
