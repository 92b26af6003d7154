"""Which file is taken when none is named."""

from pathlib import Path

import pytest

from powerinfer_cli.files import (
    DEMO_MODEL,
    PLAN_SUFFIX,
    SPLIT_SUFFIX,
    InputMissing,
    beside,
    find_model,
    output_file,
    stage_input,
)
from powerinfer_tools.errors import ModelError, PowerInferError


@pytest.fixture
def empty_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory and a home without any model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.delenv("POWERINFER_MODEL", raising=False)
    return tmp_path


def written(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"GGUF")
    return path


def test_the_named_model_comes_first(empty_place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POWERINFER_MODEL", str(written(empty_place / "variable.gguf")))
    named = written(empty_place / "named.gguf")
    assert find_model(named) == named


def test_then_the_variable(empty_place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(empty_place / "models" / DEMO_MODEL)
    variable = written(empty_place / "variable.gguf")
    monkeypatch.setenv("POWERINFER_MODEL", str(variable))
    assert find_model(None) == variable


def test_then_the_demo_model_here_then_in_the_data_folder(empty_place: Path) -> None:
    far = written(empty_place / "data/powerinfer" / DEMO_MODEL)
    assert find_model(None) == far
    written(empty_place / "models" / DEMO_MODEL)
    assert find_model(None) == Path("models") / DEMO_MODEL


def test_no_model_at_all_says_how_to_name_one(empty_place: Path) -> None:
    with pytest.raises(ModelError, match=r"-m FILE or \$POWERINFER_MODEL"):
        find_model(None)


def test_a_variable_that_points_nowhere_is_named(empty_place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POWERINFER_MODEL", "gone.gguf")
    with pytest.raises(ModelError, match=r"gone\.gguf \(named by \$POWERINFER_MODEL\): no such file"):
        find_model(None)


def test_a_directory_is_a_model_and_has_a_name(empty_place: Path) -> None:
    (empty_place / "tiny").mkdir()
    assert find_model(Path("tiny/")) == Path("tiny")
    assert find_model(Path()) == find_model(Path("tiny/..")) == empty_place.resolve()
    assert beside(find_model(Path("tiny/")), PLAN_SUFFIX) == Path("tiny.plan.json")


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("a/b.gguf", "a/b.plan.json"),
        ("b.Q4_1.gguf", "b.Q4_1.plan.json"),
        ("b.powerinfer.gguf", "b.plan.json"),
        ("b.GGUF", "b.plan.json"),
        ("b", "b.plan.json"),
        (".gguf", ".gguf.plan.json"),
    ],
)
def test_names_beside_the_model(model: str, expected: str) -> None:
    assert beside(Path(model), PLAN_SUFFIX) == Path(expected)


def test_a_missing_input_says_which_command_makes_it(empty_place: Path) -> None:
    with pytest.raises(
        InputMissing, match=r"m\.plan\.json: no such file; make it with: powerinfer plan -m m\.gguf"
    ):
        stage_input(None, Path("m.gguf"), PLAN_SUFFIX, made_by="plan")


def test_an_input_found_beside_is_said(empty_place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(Path("m.plan.json"))
    assert stage_input(None, Path("m.gguf"), PLAN_SUFFIX, made_by="plan") == path
    assert capsys.readouterr().err == "using m.plan.json\n"


def test_output_never_is_the_model(empty_place: Path) -> None:
    model = written(Path("m.powerinfer.gguf"))
    with pytest.raises(PowerInferError, match="is the model itself"):
        output_file(None, model, SPLIT_SUFFIX)


def test_output_needs_its_folder(empty_place: Path) -> None:
    with pytest.raises(InputMissing, match="no such folder"):
        output_file(Path("gone/out.gguf"), Path("m.gguf"), SPLIT_SUFFIX)
