"""No number on the command line reaches "internal error": every numeric option of the commands that
end soon, with numbers that no machine has."""

import os
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from powerinfer_cli.app import create_app
from tiny_models import FAMILY_CASES, make_tiny_model

APP = create_app()
#: What each command needs beside the option; none of them runs for long.
WORDS = {
    "profile": "-m relu.gguf --corpus text.txt -c 64 --trace 1200 -t 1",
    "plan": "-m relu.gguf --hardware pc-low --vram 33MiB --ctx 64",
    "convert": "-m relu.gguf",
    "run": "--raw -m relu.gguf -p the -n 2 -c 64 -t 1",
    "eval": "-m relu.gguf --text text.txt -c 64 --chunks 1 -t 1",
    "quantize": "-m relu.gguf --type Q8_0 -o out.gguf",
}
EXTREME = {"INT": ("1" + "0" * 30, "-1"), "FLOAT": ("nan", "1e308", "-1e308")}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and a text; no stage has run yet."""
    folder = tmp_path_factory.mktemp("place")
    make_tiny_model(folder, FAMILY_CASES["llama-relu"], "relu")
    (folder / "text.txt").write_text("the cat sat on the mat and the dog sat on the log. " * 60)
    return folder


def kind_of(parameter: Any) -> str:
    """INT or FLOAT, for options of numbers."""
    return {int: "INT", float: "FLOAT"}.get(parameter.type_descriptor.annotation, "")


@pytest.mark.parametrize("name", sorted(WORDS))
def test_extreme_numbers(name: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("XDG_CONFIG_HOME", os.devnull)
    group: Any = typer.main.get_command(APP)
    options = [p for p in group.commands[name].params if kind_of(p) and p.opts[0].startswith("-")]
    assert options
    for option in options:
        for value in EXTREME[kind_of(option)]:
            ended = CliRunner().invoke(APP, [name, *WORDS[name].split(), f"{option.opts[0]}={value}"])
            said = f"{option.opts[0]} {value}: {ended.stderr[-300:]}"
            assert "internal error" not in ended.stderr, said
            assert isinstance(ended.exception, SystemExit | None), said
