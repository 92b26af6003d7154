"""``powerinfer eval``: perplexity, and the divergence from another model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from powerinfer_cli import options as opt
from powerinfer_cli.console import emit_json, progress, say
from powerinfer_cli.eval_modes import EVERY_MODE, measure_modes, modes_of, show_modes
from powerinfer_cli.eval_tasks import Tasks, score_tasks, show_tasks
from powerinfer_cli.files import find_model
from powerinfer_cli.help import HelpfulCommand
from powerinfer_cli.tables import print_facts

if TYPE_CHECKING:
    from powerinfer_tools.engine import Engine
    from powerinfer_tools.model.loading import Model
    from powerinfer_tools.progress import Progress

HELP = """Measure perplexity on a text, and the divergence from another model or between modes.

Perplexity is counted as in llama.cpp: windows of --ctx tokens that do not overlap, each beginning with BOS if
the model adds one; the second half of each window is scored. --compare runs one file in several modes
(without a value: in all of them). For each mode it prints perplexity, KL divergence from dense, the share of
equal first choices, density, and the recall of predictors. --tasks asks multiple-choice questions instead
(EleutherAI's lm-eval, extra lm-eval) and prints the accuracy ± its standard error; with --compare, for every
mode.

\b
Examples:
  powerinfer eval -m model.gguf --text book.txt
  powerinfer eval -m model.powerinfer.gguf --text book.txt --against model.gguf --chunks 10
  powerinfer eval -m model.powerinfer.gguf --text book.txt --compare gate-first,predicted
  powerinfer eval -m model.gguf --tasks piqa,winogrande --tasks-dir my-tasks
"""


class EvalCommand(HelpfulCommand):
    """A command whose ``--compare`` may stand alone."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Give a bare ``--compare`` its value, every mode."""
        following = [*args[1:], "-"]
        words = [
            f"--compare={EVERY_MODE}" if word == "--compare" and after.startswith("-") else word
            for word, after in zip(args, following, strict=True)
        ]
        return super().parse_args(ctx, words)


CLASS = EvalCommand


def command(
    *,
    model: opt.ModelChoice,
    text: Annotated[
        Path | None,
        typer.Option("--text", "-f", metavar="FILE", help="Text to score; - reads it from stdin."),
    ] = None,
    ctx: opt.Window = 512,
    chunks: Annotated[
        int | None, typer.Option("--chunks", min=1, metavar="N", help="Score only the first N windows.")
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            "--against", metavar="FILE", help="Model to compare with: prints the KL divergence from it."
        ),
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(
            "--compare",
            metavar="[MODES]",
            help=f"Modes to set side by side, separated by commas; without a value {EVERY_MODE}.",
        ),
    ] = None,
    tasks: Tasks,
    placement: opt.Placement,
    common: opt.Common,
) -> None:
    """Measure perplexity, divergence, or accuracy on tasks."""
    if (text is None) is not bool(tasks.names):
        raise typer.BadParameter("give a text to score, or --tasks", param_hint="--text")
    path = find_model(model)
    base = find_model(against) if against is not None else None
    modes = modes_of(compare) if compare is not None else ()
    if modes and (base is not None or placement.mode != "auto"):
        raise typer.BadParameter("cannot be combined with --against or --mode", param_hint="--compare")
    from powerinfer_cli.engines import engines_of, opened_engine, read_text

    listener = progress()
    if text is None:
        with engines_of(path, placement, threads=common.threads, context=None) as (loaded, open_engine):
            rows = score_tasks(open_engine, loaded, modes or (placement.engine_mode,), tasks, listener)
        show_tasks(rows, {"model": path}, as_json=common.json)
        return
    content = read_text(text)
    if modes:
        with engines_of(path, placement, threads=common.threads, context=ctx) as (loaded, open_engine):
            pieces = text_windows(loaded, content, ctx, chunks)
            compared = measure_modes(open_engine, loaded, modes, pieces, listener)
        about = {"model": path, "text": text, "context": ctx, "chunks": len(pieces)}
        show_modes(compared, about, as_json=common.json)
        return
    with opened_engine(path, placement, threads=common.threads, context=ctx) as engine:
        pieces = text_windows(engine.model, content, ctx, chunks)
        result = score(engine, pieces, listener)
        if base is not None:
            with opened_engine(base, opt.Placement(), threads=common.threads, context=ctx) as other:
                result |= diverge(engine, other, pieces, listener)
    show({"model": path, "text": text} | result, as_json=common.json)


def text_windows(model: "Model", text: str, ctx: int, chunks: int | None) -> list[list[int]]:
    """The windows of token ids that are scored."""
    from powerinfer_tools.quality.perplexity import windows
    from powerinfer_tools.text import Tokenizer

    tokenizer = Tokenizer.from_gguf(model.source)
    for notice in tokenizer.notices:
        say(notice)
    return windows(tokenizer.encode(text), ctx, chunks, tokenizer.bos_id if tokenizer.adds_bos else None)


def score(engine: "Engine", pieces: list[list[int]], listener: "Progress") -> dict[str, Any]:
    """Perplexity and what it was taken over."""
    from powerinfer_tools.quality.perplexity import perplexity

    return perplexity(engine, pieces, listener).as_dict() | {"mode": engine.report().mode}


def diverge(
    engine: "Engine", base: "Engine", pieces: list[list[int]], listener: "Progress"
) -> dict[str, Any]:
    """Divergence of the model from ``base``."""
    from powerinfer_tools.quality.perplexity import divergence

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
