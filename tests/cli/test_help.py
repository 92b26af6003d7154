"""Help: there for every command, with examples, in the documentation, and quick because little is loaded."""

import importlib.util
import json
from pathlib import Path

import pytest

from powerinfer_cli.app import COMMANDS
from processes import Command, modules_loaded_by

HEAVY = (
    "numpy",
    "rich",
    "torch",
    "tokenizers",
    "jinja2",
    "highspy",
    "safetensors",
    "transformers",
    "powerinfer_kernels",
)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(powerinfer: Command, name: str) -> None:
    ended = powerinfer(name, "--help")
    assert ended.code == 0
    assert ended.err == ""
    assert f"Usage: powerinfer {name}" in ended.out
    assert "Examples:\n" in ended.out
    assert f"    powerinfer {name}" in ended.out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_stage_takes_json_and_threads(powerinfer: Command, name: str) -> None:
    shown = powerinfer(name, "--help").out
    assert "--json" in shown
    assert "--threads N" in shown


def test_short_help_is_the_same_as_long(powerinfer: Command) -> None:
    assert powerinfer("-h").out == powerinfer("--help").out


def test_no_command_shows_help_and_is_a_usage_error(powerinfer: Command) -> None:
    ended = powerinfer()
    assert ended.code == 2
    assert "Commands:" in ended.out + ended.err


def test_plan_names_what_it_knows(powerinfer: Command) -> None:
    assert "hardware: pc-high, pc-low" in powerinfer("plan", "--list").out
    names = json.loads(powerinfer("plan", "--list", "--json").out)
    assert {"opt-30b", "llama-2-70b", "bamboo-7b"} <= set(names["shapes"])
    assert {"f16", "q4_0"} <= set(names["dtypes"])


def test_version(powerinfer: Command) -> None:
    from powerinfer_tools import __version__

    assert powerinfer("--version").out == f"powerinfer {__version__}\n"


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["run", "--help"], ["profile", "merge", "--help"]]
)
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    assert not modules_loaded_by(*arguments) & set(HEAVY)


def test_help_of_one_command_loads_that_command_only() -> None:
    modules = {name for name in modules_loaded_by("plan", "--help") if name.endswith("_command")}
    assert modules == {"powerinfer_cli.plan_command"}


def test_documentation_is_what_help_says(repository_root: Path) -> None:
    script = repository_root / "scripts/write_cli_docs.py"
    spec = importlib.util.spec_from_file_location("write_cli_docs", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    written = (repository_root / "docs/cli.md").read_text(encoding="utf-8")
    assert written == module.page(), "docs/cli.md is out of date; run: make docs"


def test_the_page_of_commands_names_every_command(repository_root: Path) -> None:
    page = (repository_root / "docs/commands.md").read_text(encoding="utf-8")
    assert not [name for name in COMMANDS if f"`powerinfer {name}`" not in page]
