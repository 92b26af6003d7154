"""``powerinfer threshold``: which neurons of a SiLU or GELU model may be left out, within a budget."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from powerinfer_cli import options as opt
from powerinfer_cli.boundary import FAILED
from powerinfer_cli.console import emit_json, progress, say
from powerinfer_cli.files import PROFILE_SUFFIX, THRESHOLDS_SUFFIX, find_model, output_file, stage_input
from powerinfer_cli.sizes import parse_share
from powerinfer_cli.tables import print_facts, print_table

if TYPE_CHECKING:
    from powerinfer_tools.stages.threshold import ThresholdReport

HELP = """Choose which neurons of a SiLU or GELU model may be left out, within a budget of perplexity.

These models have no exact zeros, so leaving neurons out changes answers, and only happens when you ask for
it. One factor of act(gate)·up is computed for all neurons, and the other rows of a neuron are read only if
this factor is large. The budget is spent in the layers where it saves most: thresholds are chosen on one half
of the text, and their cost is measured on the other half. Writes NAME.thresholds.safetensors; convert copies
it into the split file, for run --mode thresholded.

\b
Examples:
  powerinfer profile   -m model.gguf --corpus texts/
  powerinfer threshold -m model.gguf --text book.txt --max-ppl-increase 1%
  powerinfer plan      -m model.gguf
  powerinfer convert   -m model.gguf
  powerinfer run       -m model.powerinfer.gguf --mode thresholded
"""


def share_value(text: str) -> float:
    """A share given on the command line; a malformed one is a usage error."""
    try:
        return parse_share(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def command(
    *,
    model: opt.ModelChoice,
    text: Annotated[
        Path,
        typer.Option(
            "--text",
            "-f",
            metavar="FILE",
            help="Text to choose thresholds and measure their cost on; - is stdin.",
        ),
    ],
    max_ppl_increase: Annotated[
        float,
        typer.Option(
            "--max-ppl-increase",
            parser=share_value,
            metavar="SHARE",
            help="Allowed relative increase of perplexity: 1% or 0.01.",
        ),
    ],
    profile: opt.Profile = None,
    ctx: opt.Window = 512,
    windows: Annotated[
        int,
        typer.Option(
            "--windows", min=1, max=1024, metavar="N", help="Windows to choose on, and as many to measure on."
        ),
    ] = 4,
    output: opt.Output = None,
    allow_over_budget: Annotated[
        bool,
        typer.Option(
            "--allow-over-budget", help="Exit code 0 even if the measured increase is above the budget."
        ),
    ] = False,
    common: opt.Common,
) -> None:
    """Choose neurons to leave out (SiLU, GELU models)."""
    source = find_model(model)
    profile_path = stage_input(profile, source, PROFILE_SUFFIX, made_by="profile")
    path = output_file(output, source, THRESHOLDS_SUFFIX)
    from powerinfer_cli.engines import read_text
    from powerinfer_tools.stages.threshold import ThresholdOptions, run_threshold

    report = run_threshold(
        ThresholdOptions(
            source,
            profile_path,
            read_text(text),
            path,
            max_ppl_increase,
            ctx,
            windows,
            threads=common.threads,
        ),
        progress(),
    )
    show(report, as_json=common.json)
    cost = report.header.cost
    increase = cost.perplexity / cost.dense_perplexity - 1
    if increase > report.header.max_increase and not allow_over_budget:
        say(
            f"the measured increase, {increase:.2%}, is above the {report.header.max_increase:.2%} allowed; "
            "choose on more text (--windows), or pass --allow-over-budget to accept it"
        )
        raise typer.Exit(FAILED)


def show(report: "ThresholdReport", *, as_json: bool) -> None:
    """A row for each layer, and the whole."""
    if as_json:
        emit_json(report.as_dict())
        return
    header, cost = report.header, report.header.cost
    rows = [
        (str(index), factor if factor != "none" else "–", f"{density:.0%}")
        for index, (factor, density) in enumerate(zip(header.factors, header.densities, strict=True))
    ]
    print_table(("layer", "computed first", "density"), rows)
    say(f"wrote {report.output}")
    ratio = cost.perplexity / cost.dense_perplexity
    print_facts(
        [
            ("density", f"{report.density:.1%}; the same in every layer: {header.uniform_density:.0%}"),
            ("FFN bytes a token", f"{report.ffn_share:.1%} of dense"),
            ("perplexity", f"{cost.perplexity:.4f}, dense {cost.dense_perplexity:.4f}"),
            (
                "increase",
                f"{ratio - 1:+.2%} ± {cost.ratio_error:.2%} on {cost.tokens:,} tokens not chosen on; "
                f"{header.max_increase:.2%} allowed",
            ),
            ("KL divergence", f"{cost.kl:.2e} nats a token"),
        ]
    )
