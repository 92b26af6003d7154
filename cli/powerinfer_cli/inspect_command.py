"""``powerinfer inspect``: what a file holds; a profile's activation curve; a model's tokens of a text."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from powerinfer_cli import options as opt
from powerinfer_cli.console import emit, emit_json, say
from powerinfer_cli.files import find_model
from powerinfer_cli.sizes import format_size
from powerinfer_cli.tables import print_facts, print_table

if TYPE_CHECKING:
    from powerinfer_tools.inspection import Description

HELP = """Show what a file holds: a GGUF model, a split file, a profile, a plan or a hardware profile.

For a profile, the activation curve: which share of the neurons makes which share of the activity. With
--tokenize, a model's token ids of a text ("-" reads it from standard input).

\b
Examples:
  powerinfer inspect model.gguf --tensors
  powerinfer inspect model.profile.safetensors --chart curve.svg
  powerinfer inspect model.gguf --tokenize "Hello" --json
"""


def command(
    *,
    path: Annotated[Path, typer.Argument(metavar="FILE", help="File to look into.")],
    tokenize: Annotated[
        str | None,
        typer.Option("--tokenize", metavar="TEXT|-", help="Print the model's token ids of this text."),
    ] = None,
    bos: Annotated[
        bool, typer.Option("--bos", help="With --tokenize: begin as a prompt would, with BOS.")
    ] = False,
    special: Annotated[
        bool,
        typer.Option("--special", help="With --tokenize: read control tokens such as <|im_start|> as such."),
    ] = False,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    layer: Annotated[
        int | None,
        typer.Option("--layer", min=0, metavar="N", help="Draw the curve of one layer of a profile."),
    ] = None,
    chart: Annotated[
        Path | None,
        typer.Option(
            "--chart", metavar="FILE", help="Draw the curves of a profile into a .png or .svg file."
        ),
    ] = None,
    common: opt.Common,
) -> None:
    """Inspect a file."""
    if tokenize is not None:
        show_tokens(path, tokenize, with_bos=bos, parse_special=special, as_json=common.json)
        return
    from powerinfer_tools.inspection import describe

    description = describe(path)
    if chart is not None:
        from powerinfer_tools.inspection import draw_curves

        draw_curves(path, chart)
        say(f"wrote {chart}")
    if common.json:
        emit_json(json_value(description, path, with_tensors=tensors))
        return
    show(description, path, with_tensors=tensors, layer=layer)


def show_tokens(model: Path, text: str, *, with_bos: bool, parse_special: bool, as_json: bool) -> None:
    """Token ids of ``text``, or of standard input."""
    from powerinfer_cli.engines import read_text
    from powerinfer_formats.gguf_reader import GGUFFile
    from powerinfer_tools.text import Tokenizer

    given = read_text(Path("-")) if text == "-" else text
    model_file = GGUFFile.open(find_model(model))
    ids = Tokenizer.from_gguf(model_file).encode(
        given, add_bos=None if with_bos else False, parse_special=parse_special
    )
    if as_json:
        emit_json({"ids": ids})
    else:
        emit(" ".join(str(token) for token in ids))


def json_value(description: "Description", path: Path, *, with_tensors: bool) -> dict[str, Any]:
    """The description as one object; for a profile with its curves."""
    value: dict[str, Any] = {"path": path, "kind": description.kind, **description.facts}
    if with_tensors:
        value["tensors"] = description.tensors
    if description.kind == "profile":
        from powerinfer_tools.inspection import activation_curves

        value["curve"] = activation_curves(path)
    return value


def show(description: "Description", path: Path, *, with_tensors: bool, layer: int | None) -> None:
    """Facts as lines, tensors as a table, a profile's curve as a chart in the terminal."""
    print_facts([("file", str(path)), ("kind", description.kind), *description.lines])
    if with_tensors:
        rows = [
            (tensor.name, tensor.row_type, "×".join(map(str, tensor.shape)), format_size(tensor.nbytes))
            for tensor in description.tensors
        ]
        print_table(("tensor", "type", "shape", "size"), rows)
    if description.kind == "profile":
        from powerinfer_tools.inspection import terminal_chart

        emit(terminal_chart(path, layer))
