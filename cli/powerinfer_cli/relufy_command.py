"""``powerinfer relufy``: make a model with true zeros out of one that has none."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from powerinfer_cli import options as opt
from powerinfer_cli.console import emit_json, progress, say
from powerinfer_cli.corpus_option import CorpusCommand
from powerinfer_cli.files import find_model, output_file
from powerinfer_cli.tables import print_facts

if TYPE_CHECKING:
    from powerinfer_tools.relufication import RelufyReport

CLASS = CorpusCommand
HELP = """Turn a gated SiLU or GELU model into one with true zeros, so that skipping neurons becomes exact.

Replaces the activation, fits every layer's FFN alone, then distils the dense model's next-token predictions
while pressing the density down. Only FFN weights change. The result is a GGUF file that every other stage
takes; it answers differently from the source, by as much as is printed. Interrupted work is taken up again
by the same command. Needs torch.

\b
Examples:
  powerinfer relufy -m model.gguf --corpus texts/
  powerinfer relufy -m model.gguf --corpus texts/ --density 0.15 --steps 2000 --device cuda
"""

_training = opt.in_panel("Training")


def command(
    *,
    model: opt.Model = None,
    corpus: Annotated[
        list[Path] | None,
        typer.Option("--corpus", metavar="FILE...", help="Text files, JSONL files or folders of them."),
    ] = None,
    output: opt.Output = None,
    activation: Annotated[
        Literal["relu", "drelu"],
        typer.Option("--activation", help="relu(gate)·up, or relu(gate)·relu(up), which has more zeros."),
    ] = "relu",
    density: Annotated[
        float,
        typer.Option(
            "--density", min=0.01, max=1.0, metavar="SHARE", help="Share of active neurons to aim at."
        ),
    ] = 0.2,
    steps: Annotated[
        int, _training("--steps", min=1, metavar="N", help="Steps of distillation of the whole model.")
    ] = 400,
    layer_steps: Annotated[
        int, _training("--layer-steps", min=0, metavar="N", help="Steps of each layer alone, before.")
    ] = 60,
    batch: Annotated[int, _training("--batch", min=1, metavar="N", help="Windows in a step.")] = 4,
    window: opt.Window = 512,
    rank: Annotated[
        int,
        _training(
            "--rank", min=0, metavar="R", help="Rank of the change of each matrix; 0 trains all of it."
        ),
    ] = 32,
    rate: Annotated[
        float | None,
        _training(
            "--learning-rate",
            min=1e-7,
            max=1.0,
            metavar="RATE",
            help="Highest learning rate. Without it: 1e-3, and 2e-4 with --rank 0.",
        ),
    ] = None,
    patience: Annotated[
        int,
        _training(
            "--patience", min=0, metavar="N", help="Stop after N checks without a better model; 0: never."
        ),
    ] = 0,
    seed: Annotated[int, _training("--seed", min=0, metavar="N", help="Order of the text.")] = 0,
    device: Annotated[Literal["cpu", "cuda"], _training("--device", help="Where torch trains.")] = "cpu",
    quant: Annotated[
        Literal["Q8_0", "Q4_0", "F16", "BF16", "F32"],
        typer.Option("--quant", help="Type of the new FFN weights; the others keep their bits."),
    ] = "Q8_0",
    restart: Annotated[
        bool, typer.Option("--restart", help="Forget interrupted work and begin anew.")
    ] = False,
    common: opt.Common,
) -> None:
    """Turn a model into one with true zeros."""
    if not corpus:
        raise typer.BadParameter("name at least one text file, JSONL file or folder", param_hint="--corpus")
    source = find_model(model)
    path = output_file(output, source, f".{activation}.gguf")
    from powerinfer_tools.relufication import RelufyOptions, run_relufy

    options = RelufyOptions(
        model=source,
        corpus=tuple(corpus),
        output=path,
        activation=activation,
        density=density,
        rank=rank,
        steps=steps,
        layer_steps=layer_steps,
        batch=batch,
        window=window,
        learning_rate=rate or (1e-3 if rank else 2e-4),
        patience=patience,
        quant=quant,
        device=device,
        threads=common.threads,
        seed=seed,
        restart=restart,
    )
    show(run_relufy(options, progress()), as_json=common.json)


def show(report: "RelufyReport", *, as_json: bool) -> None:
    """What was written, and what it costs in quality."""
    if as_json:
        emit_json(report.as_dict())
        return
    say(f"wrote {report.output}")
    ratio = report.perplexity / report.dense_perplexity
    print_facts(
        [
            ("zeros", f"{1 - report.density:.1%} of the neurons, on held-out windows"),
            (
                "perplexity there",
                f"{report.perplexity:.2f}; dense {report.dense_perplexity:.2f} (ratio {ratio:.3f})",
            ),
            ("KL divergence", f"{report.kl:.3f} nats a token from the dense model"),
            ("learned from", f"{report.tokens:,} tokens in {report.seconds:,.0f} s"),
        ]
    )
