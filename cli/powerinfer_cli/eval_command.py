"""``powerinfer eval``: perplexity, and the divergence from another model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from powerinfer_cli import options as opt
from powerinfer_cli.console import emit_json, progress, say
from powerinfer_cli.files import find_model
from powerinfer_cli.tables import print_facts

if TYPE_CHECKING:
    from powerinfer_tools.engine import Engine
    from powerinfer_tools.progress import Progress

HELP = """Measure perplexity on a text, and how far a model's predictions are from another's.

Counted as llama.cpp counts it: windows of --ctx tokens that don't overlap, each beginning with BOS where the
model adds one; the second half of each window is scored.

\b
Examples:
  powerinfer eval -m model.gguf --text book.txt
  powerinfer eval -m model.powerinfer.gguf --text book.txt --against model.gguf --chunks 10
"""


def command(
    *,
    model: opt.Model = None,
    text: Annotated[
        Path, typer.Option("--text", "-f", metavar="FILE", help="Text to score; - reads it from stdin.")
    ],
    ctx: opt.Window = 512,
    chunks: Annotated[
        int | None, typer.Option("--chunks", min=1, metavar="N", help="Score only the first N windows.")
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            "--against", metavar="FILE", help="Model to compare with: KL divergence from it, token by token."
        ),
    ] = None,
    placement: opt.Placement,
    common: opt.Common,
) -> None:
    """Evaluate a model on a text."""
    path = find_model(model)
    base = find_model(against) if against is not None else None
    from powerinfer_cli.engines import opened_engine, read_text

    content = read_text(text)
    listener = progress()
    with opened_engine(path, placement, threads=common.threads, context=ctx) as engine:
        pieces = text_windows(engine, content, ctx, chunks)
        result = score(engine, pieces, listener)
        if base is not None:
            with opened_engine(base, opt.Placement(), threads=common.threads, context=ctx) as other:
                result |= compare(engine, other, pieces, listener)
    show({"model": path, "text": text} | result, as_json=common.json)


def text_windows(engine: "Engine", text: str, ctx: int, chunks: int | None) -> list[list[int]]:
    """The windows of token ids that are scored."""
    from powerinfer_tools.evaluation import windows
    from powerinfer_tools.text import Tokenizer

    tokenizer = Tokenizer.from_gguf(engine.model.gguf)
    for notice in tokenizer.notices:
        say(notice)
    return windows(tokenizer.encode(text), ctx, chunks, tokenizer.bos_id if tokenizer.adds_bos else None)


def score(engine: "Engine", pieces: list[list[int]], listener: "Progress") -> dict[str, Any]:
    """Perplexity and what it was taken over."""
    from powerinfer_tools.evaluation import perplexity

    return perplexity(engine, pieces, listener).as_dict() | {"mode": engine.report().mode}


def compare(
    engine: "Engine", base: "Engine", pieces: list[list[int]], listener: "Progress"
) -> dict[str, Any]:
    """Divergence of the model from ``base``."""
    from powerinfer_tools.evaluation import divergence

    return {"against": base.model.path, "divergence": divergence(engine, base, pieces, listener).as_dict()}


def show(result: dict[str, Any], *, as_json: bool) -> None:
    """The figures."""
    if as_json:
        emit_json(result)
        return
    facts = [
        ("perplexity", f"{result['perplexity']:.4f} ± {result['standard_error']:.4f}"),
        ("scored", f"{result['tokens']:,} tokens in {result['chunks']:,} windows of {result['context']}"),
    ]
    if "divergence" in result:
        other = result["divergence"]
        facts += [
            ("against", str(result["against"])),
            ("its perplexity", f"{other['base_perplexity']:.4f}"),
            ("KL divergence", f"{other['mean_kl']:.2e} nats a token (largest {other['max_kl']:.2e})"),
            ("same first choice", f"{other['same_top']:.2%} of {other['positions']:,} tokens"),
        ]
    print_facts(facts)
