"""``powerinfer inspect``: what a file holds; a profile's activation curve; a model's tokens of a text."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from powerinfer_cli import options as opt
from powerinfer_cli.console import emit, emit_json, say
from powerinfer_cli.files import find_model
from powerinfer_cli.sizes import format_size
from powerinfer_cli.tables import print_facts, print_table

if TYPE_CHECKING:
    from powerinfer_tools.inspect import Curves, Description

HELP = """Show the contents of a file: a model, a split file, a profile, a plan or a hardware profile.

Of a model, it shows whether the model runs here, and if not, why; whether it has true zeros; its bytes by
part, its memory here, and the expected speed. It reads only the header, so it also works for damaged files
and for families that do not run. Of a profile, it shows the activation curve: the share of activity by share
of neurons; and, if the neurons inside experts were counted, the share of them that is active, by layer.
--tokenize prints a model's token ids of a text ("-" reads the text from standard input).

\b
Examples:
  powerinfer inspect model.gguf --tensors
  powerinfer inspect model.profile.safetensors --chart curve.svg
  powerinfer inspect model.gguf --tokenize "Hello" --json
  powerinfer inspect --families
"""


def command(
    *,
    path: Annotated[Path | None, typer.Argument(metavar="FILE", help="File or model directory.")] = None,
    families: Annotated[
        bool, typer.Option("--families", help="List the model families that run, and end.")
    ] = False,
    tokenize: Annotated[
        str | None,
        typer.Option("--tokenize", metavar="TEXT|-", help="Print the model's token ids for this text."),
    ] = None,
    bos: Annotated[
        bool, typer.Option("--bos", help="With --tokenize: begin with BOS, like a prompt.")
    ] = False,
    special: Annotated[
        bool,
        typer.Option("--special", help="With --tokenize: text such as <|im_start|> becomes a control token."),
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
    """Show the contents of a file."""
    if families:
        show_families(as_json=common.json)
        return
    if path is None:
        raise typer.BadParameter("name a file, or use --families", param_hint="FILE")
    if tokenize is not None:
        show_tokens(path, tokenize, with_bos=bos, parse_special=special, as_json=common.json)
        return
    from powerinfer_tools.inspect import describe

    description = describe(path)
    fault = description.fault if description.kind == "damaged model" else None
    if fault is not None:
        if common.json:  # what its header says, for programs
            emit_json(json_value(description, None, path, with_tensors=tensors))
        raise fault
    curves = profile_curves(description) if description.profile is not None else None
    if curves is None and (chart is not None or layer is not None):
        raise typer.BadParameter(
            f"{path} is a {description.kind}; only a profile has curves", param_hint="--chart"
        )
    if curves is not None and layer is not None and layer >= len(curves.layers):
        raise typer.BadParameter(f"the model has layers 0 to {len(curves.layers) - 1}", param_hint="--layer")
    if chart is not None and curves is not None:
        from powerinfer_tools.inspect import draw_curves

        draw_curves(curves, chart, str(description.facts["model"]))
        say(f"wrote {chart}")
    if common.json:
        emit_json(json_value(description, curves, path, with_tensors=tensors))
    else:
        show(description, path, with_tensors=tensors)
        if curves is not None and curves.inside:
            show_inside(curves)
        if curves is not None:
            show_curve(curves, layer)


def show_families(*, as_json: bool) -> None:
    """A row for each family that runs: what it is called in a file's ``general.architecture``."""
    from powerinfer_tools.inspect.families import supported_families

    rows = supported_families()
    if as_json:
        emit_json(rows)
        return
    print_table(
        ("family", "activation", "true zeros", "FFN", "mixes tokens by"),
        [(row.name, row.activation, "yes" if row.true_zeros else "", row.ffn, row.mixer) for row in rows],
    )


def profile_curves(description: "Description") -> "Curves":
    """The curves of a profile."""
    from powerinfer_tools.inspect import activation_curves

    assert description.profile is not None
    return activation_curves(description.profile)


def show_tokens(model: Path, text: str, *, with_bos: bool, parse_special: bool, as_json: bool) -> None:
    """Token ids of ``text``, or of standard input."""
    from powerinfer_cli.engines import read_text
    from powerinfer_tools.model.sources import open_source
    from powerinfer_tools.text import Tokenizer

    content = read_text(Path("-")) if text == "-" else text
    tokenizer = Tokenizer.from_gguf(open_source(find_model(model)))
    ids = tokenizer.encode(content, add_bos=None if with_bos else False, parse_special=parse_special)
    if as_json:
        emit_json({"ids": ids})
    else:
        emit(" ".join(str(token) for token in ids))


def json_value(
    description: "Description", curves: "Curves | None", path: Path, *, with_tensors: bool
) -> dict[str, Any]:
    """The description as one object; for a profile with its curves."""
    value: dict[str, Any] = {"path": path, "kind": description.kind, **description.facts}
    if with_tensors:
        value["tensors"] = description.tensors
    if curves is not None:
        value["curve"] = curves.as_dict()
    return value


def show(description: "Description", path: Path, *, with_tensors: bool) -> None:
    """Facts as lines, and tensors as a table."""
    facts = dict(description.facts)
    # A plan has a verdict of its own, a sentence.
    verdict = facts.pop("verdict") if isinstance(facts.get("verdict"), dict) else {}
    print_facts(
        [
            ("file", str(path)),
            ("kind", description.kind),
            *(verdict_lines(verdict) if verdict else ()),
            *fact_lines(facts),
        ]
    )
    if with_tensors:
        rows = [
            (tensor.name, tensor.row_type, "×".join(map(str, tensor.shape)), format_size(tensor.nbytes))
            for tensor in description.tensors
        ]
        print_table(("tensor", "type", "shape", "size"), rows)


def verdict_lines(verdict: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What can be done with a model, in a few lines."""
    yield "family", verdict["family"]
    yield "runs", "yes" if verdict["runs"] else f"no: {verdict.get('reason', '')}"
    if "true_zeros" in verdict:
        skipped = "idle neurons can be skipped exactly" if verdict["true_zeros"] else "every neuron counts"
        yield "activation", f"{verdict['activation']}: {skipped}"
    for part, nbytes in verdict["parts"].items():
        yield f"bytes of {part}", format_size(nbytes)
    if not verdict["runs"]:
        return
    weights, cache = (format_size(verdict[f"{kind}_bytes"]) for kind in ("memory", "cache"))
    yield "memory", f"{weights} of weights, {cache} of KV cache for {verdict['context']:,} tokens"
    for row_type, nbytes in verdict["packed"].items():
        yield f"packed {row_type}", format_size(nbytes)
    if "free_bytes" in verdict:
        yield (
            "free here",
            f"{format_size(verdict['free_bytes'])}: {'fits' if verdict['fits'] else 'does not fit'}",
        )
    speed = verdict.get("tokens_per_second")
    yield "expected", f"{speed:.1f} tok/s" if speed else "powerinfer advise measures this machine and says it"


def fact_lines(facts: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Facts as ``name, value`` lines; lists of records are tables of their own (--json has all of them)."""
    for name, value in facts.items():
        if isinstance(value, dict):
            yield from fact_lines(value, f"{prefix}{name}.")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            yield f"{prefix}{name}", f"{len(value)}, shown by --json"
        elif isinstance(value, list):
            yield f"{prefix}{name}", ", ".join(map(str, value))
        elif isinstance(value, float):
            yield f"{prefix}{name}", f"{value:.6g}"
        elif name == "bytes" or name.endswith("_bytes") or prefix == "types.":
            yield f"{prefix}{name}", f"{value:,} ({format_size(value)})"
        else:
            yield f"{prefix}{name}", shortened(str(value))


def shortened(text: str, limit: int = 120) -> str:
    """``text`` cut to fit a line: chat templates are pages long."""
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text):,} characters)"


def show_inside(curves: "Curves") -> None:
    """Zeros inside experts, layer by layer."""
    rows = [
        (
            str(layer.layer),
            str(len(layer.shares)),
            f"{layer.mean:.1%}",
            f"{layer.shares.min():.1%}",
            f"{layer.shares.max():.1%}",
            f"{layer.curve.neurons_for(0.8):.1%}",
        )
        for layer in curves.inside
    ]
    headings = ("layer", "experts", "active when taken", "least active", "most active", "make 80%")
    print_table(headings, rows, "Neurons inside experts")


def show_curve(curves: "Curves", layer: int | None) -> None:
    """One curve as a chart, and what it says in a line."""
    from powerinfer_tools.inspect import terminal_chart

    curve = curves.model if layer is None else curves.layers[layer]
    emit("")
    emit(terminal_chart(curve))
    emit(f"80% of the activity comes from {curve.neurons_for(0.8):.1%} of the neurons")
