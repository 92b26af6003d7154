"""eval --compare as a command: its table, its JSON object, and what it refuses."""

from pathlib import Path

import pytest

from powerinfer_cli.eval_modes import EVERY_MODE
from powerinfer_tools.comparison import ALL_MODES
from predicted_models import TEXT, predicted_split
from processes import Command

TASK = ("--text", "text.txt", "--ctx", "32", "--chunks", "2", "-t", "1")
FIGURES = {"mode", "perplexity", "kl", "top1_agreement", "density", "recall"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval")
    predicted_split(folder)
    assert (folder / "text.txt").read_text() == TEXT
    return folder


def test_the_command_knows_the_modes_of_the_stage() -> None:
    assert tuple(EVERY_MODE.split(",")) == ALL_MODES


def test_a_row_for_each_mode(powerinfer: Command, folder: Path) -> None:
    """Without a value, every mode; what this file cannot do is named, with the reason."""
    ended = powerinfer("eval", "-m", "tiny.powerinfer.gguf", "--compare", *TASK, "--json", cwd=folder)
    assert ended.code == 0, ended.err
    rows = {row["mode"]: row for row in ended.json["rows"]}
    assert list(rows) == EVERY_MODE.split(",")
    assert all(row.keys() >= FIGURES for row in rows.values())
    assert (rows["gate-first"]["kl"], rows["gate-first"]["identical"]) == (0.0, True)
    assert 0 < rows["predicted"]["recall"] < 1
    assert rows["predicted"]["kl"] > 0
    assert rows["thresholded"]["perplexity"] is None
    assert "thresholded" in rows["thresholded"]["note"]
    assert (ended.json["tokens"], ended.json["chunks"], ended.json["context"]) == (2 * (32 - 1 - 16), 2, 32)


def test_the_table_is_for_people(powerinfer: Command, folder: Path) -> None:
    ended = powerinfer(
        "eval", "-m", "tiny.powerinfer.gguf", "--compare=dense,gate-first", *TASK, cwd=folder, COLUMNS="140"
    )
    assert ended.code == 0, ended.err
    heading, _, dense, gate_first = ended.out.strip().splitlines()
    assert heading.split()[:2] == ["mode", "perplexity"]
    assert (dense.split()[0], gate_first.split()[0]) == ("dense", "gate-first")
    assert "gate-first: every logit has the bits of dense" in ended.err


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        (("-m", "tiny.gguf", "--compare", "predicted"), 1, "powerinfer convert"),
        (("-m", "tiny.gguf", "--compare", "dense,magic"), 2, "'magic' is no mode"),
        (("-m", "tiny.gguf", "--compare", "--against", "tiny.gguf"), 2, "--against"),
        (("-m", "tiny.gguf", "--compare", "--mode", "dense"), 2, "--mode"),
    ],
)
def test_refusals(
    powerinfer: Command, folder: Path, words: tuple[str, ...], code: int, expected: str
) -> None:
    ended = powerinfer("eval", *words, *TASK, cwd=folder)
    assert ended.code == code
    assert expected in ended.err
    assert not ended.out
