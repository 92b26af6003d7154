"""Groups of options: a dataclass parameter becomes the options of its fields."""

from dataclasses import dataclass
from typing import Annotated

import typer
from typer.testing import CliRunner

from powerinfer_cli.grouped import flattened


@dataclass(frozen=True)
class Paint:
    colour: Annotated[str, typer.Option("--colour")] = "red"
    coats: Annotated[int, typer.Option("--coats")] = 1


def invoke(*arguments: str) -> tuple[int, str]:
    def command(
        *, wall: Annotated[str, typer.Argument()], paint: Paint, dry: Annotated[bool, typer.Option()] = False
    ) -> None:
        typer.echo(f"{wall} {paint} {dry}")

    app = typer.Typer(rich_markup_mode=None)
    app.command()(flattened(command))
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.output


def test_fields_become_options_with_their_defaults() -> None:
    assert invoke("north") == (0, "north Paint(colour='red', coats=1) False\n")


def test_values_come_together_again() -> None:
    shown = invoke("north", "--coats", "3", "--dry", "--colour", "blue")
    assert shown == (0, "north Paint(colour='blue', coats=3) True\n")


def test_types_of_fields_are_checked() -> None:
    code, output = invoke("north", "--coats", "many")
    assert code == 2
    assert "--coats" in output
