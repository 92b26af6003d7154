"""eval as a command, --compare and --tasks: its table, its JSON object, and what it refuses."""

from pathlib import Path

import pytest

from powerinfer_cli.eval_modes import EVERY_MODE
from powerinfer_formats.modes import MODES
from predicted_models import TEXT, predicted_split
from processes import Command
from task_files import write_tasks

TASK = ("--text", "text.txt", "--ctx", "32", "--chunks", "2", "-t", "1")
FIGURES = {"mode", "perplexity", "kl", "top1_agreement", "density", "recall"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval")
    predicted_split(folder)
    assert (folder / "text.txt").read_text() == TEXT
    return folder


def test_the_command_knows_the_modes_of_the_stage() -> None:
    assert tuple(EVERY_MODE.split(",")) == MODES


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


def test_tasks_in_every_mode(powerinfer: Command, folder: Path, tmp_path: Path) -> None:
    """Exact modes answer alike. Standard output is one JSON value, whatever lm-eval prints."""
    write_tasks(tmp_path, 6)
    ended = powerinfer(
        "eval", "-m", "tiny.powerinfer.gguf", "--compare", "dense,gate-first", "--tasks", "copa,rte",
        "--tasks-dir", tmp_path, "--limit", "4", "-t", "1", "--json", cwd=folder, HF_HOME=str(tmp_path),
    )  # fmt: skip
    assert ended.code == 0, ended.err
    rows = ended.json["results"]
    assert [(row["mode"], row["task"]) for row in rows] == [
        (mode, task) for mode in ("dense", "gate-first") for task in ("copa", "rte")
    ]
    for row in rows:
        assert (row["metric"], row["samples"]) == ("acc", 4)
        assert row["value"] in (0, 0.25, 0.5, 0.75, 1)
        assert row["standard_error"] is not None
    assert [row["value"] for row in rows[:2]] == [row["value"] for row in rows[2:]]


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        (("-m", "tiny.gguf", "--compare", "predicted"), 1, "powerinfer convert"),
        (("-m", "tiny.gguf", "--compare", "dense,magic"), 2, "'magic' is not a mode"),
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
