"""``powerinfer relufy``: make a model with true zeros out of one that has none."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from powerinfer_cli import options as opt
from powerinfer_cli.console import emit_json, progress, say
from powerinfer_cli.corpus_option import CorpusCommand
from powerinfer_cli.files import find_model, output_file
from powerinfer_cli.tables import print_facts
from powerinfer_formats.block_types import RelufiedType

if TYPE_CHECKING:
    from powerinfer_tools.stages.relufy import DeltaReport, RelufyReport

CLASS = CorpusCommand
HELP = """Turn a gated SiLU or GELU model into one with true zeros, so that skipping neurons becomes exact.

Replaces the activation, fits every layer's down projection to it, then distils the dense model's next-token
predictions while it lowers the density. Only FFN weights change. The result is a GGUF file for every other
stage. It answers differently from the source; the difference is measured and printed. The same command
resumes interrupted work. Needs torch.

--save-delta keeps the result of the training as a small file, from which --delta makes the same model again,
bit for bit, without text, training or torch.

\b
Examples:
  powerinfer relufy -m model.gguf --corpus texts/
  powerinfer relufy -m model.gguf --corpus texts/ --activation fatrelu --density 0.15
  powerinfer relufy -m model.gguf --corpus texts/ --steps 2000 --device cuda
  powerinfer relufy -m model.gguf --corpus texts/ --save-delta model.delta.zst
  powerinfer relufy -m model.gguf --delta model.delta.zst
"""

_training = opt.in_panel("Training")


def command(
    *,
    model: opt.ModelChoice,
    corpus: Annotated[
        list[Path] | None,
        typer.Option("--corpus", metavar="FILE...", help="Text files, JSONL files or folders of them."),
    ] = None,
    output: opt.Output = None,
    delta: Annotated[
        Path | None,
        typer.Option(
            "--delta",
            metavar="FILE",
            help="Make the model from this delta, without training; with --corpus, train on from it.",
        ),
    ] = None,
    save_delta: Annotated[
        Path | None,
        typer.Option(
            "--save-delta", metavar="FILE", help="Also write the result of the training as a delta."
        ),
    ] = None,
    chart: Annotated[
        Path | None,
        typer.Option(
            "--chart",
            metavar="FILE",
            help="Draw perplexity and zeros over the training into a .png or .svg file.",
        ),
    ] = None,
    activation: Annotated[
        Literal["relu", "drelu", "fatrelu"],
        typer.Option(
            "--activation",
            help="relu: relu(gate)·up. With more zeros: drelu, relu(gate)·relu(up); fatrelu, gate·up "
            "if gate is above a threshold.",
        ),
    ] = "relu",
    cut: Annotated[
        float | None,
        typer.Option(
            "--cut",
            min=0.0,
            metavar="X",
            help="The threshold of fatrelu.  [default: one for each neuron, by its contribution, so "
            "that --density of them are active]",
        ),
    ] = None,
    density: Annotated[
        float,
        typer.Option("--density", min=0.01, max=1.0, metavar="SHARE", help="Target share of active neurons."),
    ] = 0.2,
    steps: Annotated[
        int,
        _training(
            "--steps",
            min=0,
            metavar="N",
            help="Steps of distillation of the whole model; 0 with --delta: only round again.",
        ),
    ] = 400,
    fit_windows: Annotated[
        int,
        _training(
            "--fit-windows",
            min=0,
            metavar="N",
            help="Windows of text for the closed-form fit of the down projections, before the distillation.",
        ),
    ] = 32,
    batch: Annotated[int, _training("--batch", min=1, metavar="N", help="Windows in one step.")] = 4,
    window: opt.Window = 512,
    rank: Annotated[
        int,
        _training(
            "--rank", min=0, metavar="R", help="Rank of the changes of gate and up; 0 trains them whole."
        ),
    ] = 32,
    rate: Annotated[
        float,
        _training(
            "--learning-rate",
            min=1e-7,
            max=1.0,
            metavar="RATE",
            help="Highest learning rate of low-rank changes; whole matrices take a fifth of it.",
        ),
    ] = 1e-3,
    patience: Annotated[
        int,
        _training(
            "--patience", min=0, metavar="N", help="Stop after N checks without a better model; 0: never."
        ),
    ] = 0,
    seed: Annotated[int, _training("--seed", min=0, metavar="N", help="Seed for the order of the text.")] = 0,
    device: Annotated[Literal["cpu", "cuda"], _training("--device", help="Where torch trains.")] = "cpu",
    quant: Annotated[
        RelufiedType | None,
        typer.Option(
            "--quant",
            help="Type of the new gate and up rows; down gets Q8_0 if they have 4 or 5 bits. All other "
            "weights keep their bits.  [default: the source's type if it has 4 or 5 bits, else Q8_0]",
        ),
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Discard interrupted work and start again.")
    ] = False,
    common: opt.Common,
) -> None:
    """Turn a SiLU or GELU model into a ReLU model."""
    source = find_model(model)
    if delta is not None and not corpus:
        if save_delta or chart:
            raise typer.BadParameter("without --corpus a delta is applied as it is: no --save-delta, --chart")
        rebuild(source, delta, output, as_json=common.json)
        return
    if not corpus:
        raise typer.BadParameter("name at least one text file, JSONL file or folder", param_hint="--corpus")
    if cut is not None and activation != "fatrelu":
        raise typer.BadParameter("only --activation fatrelu has a cut", param_hint="--cut")
    path = output_file(output, source, f".{activation}.gguf")
    from powerinfer_tools.pictures import require_drawable
    from powerinfer_tools.stages.relufy import RelufyOptions, draw_history, run_relufy

    if chart is not None:
        require_drawable(chart)
    options = RelufyOptions(
        model=source,
        corpus=tuple(corpus),
        output=path,
        activation=activation,
        cut=cut,
        density=density,
        rank=rank,
        steps=steps,
        fit_windows=fit_windows,
        batch=batch,
        window=window,
        learning_rate=rate,
        patience=patience,
        quant=quant,
        device=device,
        threads=common.threads,
        seed=seed,
        restart=restart,
        start=delta,
        save_delta=save_delta,
    )
    report = run_relufy(options, progress())
    show(report, as_json=common.json)
    if chart is not None:
        draw_history(report, chart, path.name)
        say(f"wrote {chart}")


def rebuild(source: Path, delta: Path, output: Path | None, *, as_json: bool) -> None:
    """Make the model of a delta, and show what the delta says of it."""
    from powerinfer_tools.stages.relufy import apply_delta

    report = apply_delta(source, delta, output_file(output, source, ".relu.gguf"))
    if as_json:
        emit_json(report.as_dict())
        return
    header = report.header
    say(f"wrote {report.output}")
    facts = [
        ("made by", f"{delta}: {header.activation} ({_threshold(report)}), FFN {header.row_type}"),
        ("same bits as", f"SHA-256 {header.result_sha256}"),
        ("learned from", f"{header.learned_tokens:,} tokens of distillation"),
    ]
    for quality in header.quality:
        ratio = quality.perplexity / quality.dense_perplexity
        text = (
            f"perplexity {quality.perplexity:.2f}; dense {quality.dense_perplexity:.2f} (ratio {ratio:.3f})"
        )
        facts.append((quality.text, f"{text}, {1 - quality.density:.1%} zeros, {quality.tokens:,} tokens"))
    print_facts(facts)


def _threshold(report: "DeltaReport") -> str:
    """What a gate must be above, in words."""
    return "a threshold for each neuron" if report.own_thresholds else f"above {report.header.cut:g}"


def show(report: "RelufyReport", *, as_json: bool) -> None:
    """What was written, and what it costs in quality."""
    if as_json:
        emit_json(report.as_dict())
        return
    say(f"wrote {report.output}")
    if report.delta:
        say(f"wrote {report.delta}")
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
