"""Results on standard output, everything else on standard error, nothing that a terminal would obey."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from powerinfer_cli.console import LineProgress, emit_json, plain, printable, say, shown
from powerinfer_cli.corpus_option import spread


@dataclass(frozen=True)
class Row:
    path: Path
    speeds: tuple[float, ...]


def test_json_forms() -> None:
    row = Row(Path("a/b"), (1.5, float("nan"), float("inf")))
    expected = {"path": "a/b", "speeds": [1.5, None, None]}
    assert plain({"row": row, 3: np.float32(0.5), "v": np.arange(3)}) == {
        "row": expected,
        "3": 0.5,
        "v": [0, 1, 2],
    }


def test_what_has_no_json_form_is_refused() -> None:
    with pytest.raises(TypeError, match="no JSON form for object"):
        plain(object())


def test_json_is_one_value_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    emit_json({"text": "naïve\n"})
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"text": "naïve\n"}
    assert captured.err == ""


def test_names_from_files_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    say("tensor \x1b[2J\x07named\nso")
    assert capsys.readouterr().err == "tensor  [2J named so\n"
    assert printable("größe ×") == "größe ×"


def test_progress_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    progress = LineProgress()
    progress.start("profile", 10, "tokens")
    progress.advance(4)
    assert capsys.readouterr().err == ""  # not more often than every ten seconds
    progress.note("a.txt: skipped")
    progress.finish()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "a.txt: skipped"
    assert lines[1].startswith("profile: 4 of 10 tokens, ")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("-m x --corpus a", "-m x --corpus a"),
        ("--corpus a b c -m x", "--corpus a --corpus b --corpus c -m x"),
        ("--corpus a --corpus b c", "--corpus a --corpus b --corpus c"),
        ("--corpus=a -m x", "--corpus=a -m x"),
        ("--corpus - b", "--corpus - --corpus b"),
        ("merge a b", "merge a b"),
        ("--corpus", "--corpus"),
    ],
)
def test_several_words_after_one_option(given: str, expected: str) -> None:
    assert spread(given.split(), "--corpus") == expected.split()


def test_generated_text_cannot_steer_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "a\tb\n\x1b]0;title\x07\x9b2J\x7f\r é 🙂"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert shown(text) == "a\tb\n␛]0;title␇\ufffd2J␡␍ é 🙂"
    monkeypatch.setattr("sys.stdout.isatty", lambda: False, raising=False)
    assert shown(text) == text
