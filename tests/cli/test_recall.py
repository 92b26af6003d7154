"""``run --check-recall``: what predictors found is said, in both forms, and the text stays what it is."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from powerinfer_cli.app import create_app
from predicted_models import predicted_split

APP = create_app()


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A split file with predictors."""
    return predicted_split(tmp_path_factory.mktemp("recall"))[1]


def ran(split: Path, *words: str) -> Result:
    ended = CliRunner().invoke(
        APP,
        [
            "run",
            "-v",
            "-m",
            str(split),
            "-p",
            "the cat sat",
            "-n",
            "9",
            "--temp",
            "0",
            "-c",
            "64",
            "-t",
            "1",
            *words,
        ],
    )
    assert ended.exit_code == 0, ended.stderr
    return ended


def figures(split: Path, *words: str) -> Any:
    return json.loads(ran(split, *words, "--json").stdout)


def test_recall_is_said_and_the_text_stays(split: Path) -> None:
    checked, plain = (figures(split, "--mode", "predicted", *more) for more in (("--check-recall",), ()))
    assert 0 < checked["recall"] < 1
    assert 0 < checked["predicted_density"] < 1
    assert len(checked["recall_by_layer"]) == 3
    assert all(0 < recall <= 1 for recall in checked["recall_by_layer"])
    assert plain["recall"] is None
    for same in ("ids", "text", "logits_hash", "density"):
        assert checked[same] == plain[same]


def test_recall_is_a_line_of_the_summary(split: Path) -> None:
    checked, plain = (ran(split, "--mode", "predicted", *more) for more in (("--check-recall",), ()))
    known = figures(split, "--mode", "predicted", "--check-recall")
    expected = (
        f"recall: predictors found {known['recall']:.2%} of the active neurons by naming "
        f"{known['predicted_density']:.2%} of all"
    )
    assert expected in checked.stderr.splitlines()
    assert "recall:" not in plain.stderr
    assert checked.stdout == plain.stdout


def test_without_predictors_at_work_there_is_nothing_to_check(split: Path) -> None:
    assert figures(split, "--mode", "gate-first", "--check-recall")["recall"] is None
