"""``powerinfer convert``: write the split file that a plan describes."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from powerinfer_cli import options as opt
from powerinfer_cli.console import emit_json, progress, say
from powerinfer_cli.files import (
    PLAN_SUFFIX,
    PREDICTORS_SUFFIX,
    PROFILE_SUFFIX,
    SPLIT_SUFFIX,
    THRESHOLDS_SUFFIX,
    find_model,
    optional_input,
    output_file,
    stage_input,
)
from powerinfer_cli.sizes import format_size
from powerinfer_cli.tables import print_facts

if TYPE_CHECKING:
    from powerinfer_tools.conversion import ConvertReport

HELP = """Write the split file: neurons sorted hottest first, hot and cold parts apart, as the plan says.

Takes plan, profile and, if there are any, predictors and thresholds from beside the model. Gate and up rows
keep their bits; the down projection is transposed and quantised again, and what that costs is measured and
printed.

\b
Examples:
  powerinfer convert -m model.gguf
  powerinfer convert -m model.gguf --plan small.plan.json -o small.powerinfer.gguf
"""


def command(
    *,
    model: opt.Model = None,
    plan: Annotated[
        Path | None,
        typer.Option("--plan", metavar="FILE", help="Plan. Without it: the one beside the model."),
    ] = None,
    profile: Annotated[
        Path | None,
        typer.Option("--profile", metavar="FILE", help="Profile. Without it: the one beside the model."),
    ] = None,
    predictors: Annotated[
        Path | None,
        typer.Option(
            "--predictors",
            metavar="FILE",
            help="Predictors. Without it: those beside the model, if there are any.",
        ),
    ] = None,
    thresholds: Annotated[
        Path | None,
        typer.Option(
            "--thresholds",
            metavar="FILE",
            help="Thresholds. Without it: those beside the model, if there are any.",
        ),
    ] = None,
    output: opt.Output = None,
    quant: Annotated[
        Literal["auto", "F32", "F16", "BF16", "Q8_0", "Q4_0"],
        typer.Option(
            "--quant",
            help="Type of the transposed down projection; auto: Q8_0 where the source is quantised.",
        ),
    ] = "auto",
    common: opt.Common,
) -> None:
    """Convert a model."""
    source = find_model(model)
    plan_file = stage_input(plan, source, PLAN_SUFFIX, made_by="plan")
    profile_file = stage_input(profile, source, PROFILE_SUFFIX, made_by="profile")
    predictor_file = optional_input(predictors, source, PREDICTORS_SUFFIX, made_by="train")
    threshold_file = optional_input(thresholds, source, THRESHOLDS_SUFFIX, made_by="threshold")
    path = output_file(output, source, SPLIT_SUFFIX)
    from powerinfer_tools.conversion import ConvertOptions, convert

    chosen = None if quant == "auto" else quant
    report = convert(
        ConvertOptions(
            model=source,
            plan=plan_file,
            profile=profile_file,
            predictors=predictor_file,
            thresholds=threshold_file,
            output=path,
            quant=chosen,
        ),
        progress(),
    )
    show(report, as_json=common.json)


def show(report: "ConvertReport", *, as_json: bool) -> None:
    """What was written and what the requantisation costs."""
    if as_json:
        emit_json(report.as_dict())
        return
    say(f"wrote {report.output}")
    errors = report.requantization_error
    worst = max(range(report.layers), key=lambda layer: errors[layer])
    hot, neurons = sum(report.hot_neurons), report.neurons * report.layers
    facts = [
        ("size", f"{format_size(report.nbytes)} (source {format_size(report.source_bytes)})"),
        ("hot neurons", f"{hot:,} of {neurons:,} ({hot / neurons:.1%})"),
        ("gate and up", "the source's bits"),
        ("down projection", f"{report.down_type}, transposed"),
        (
            "its relative error",
            f"{sum(errors) / len(errors):.2e} (largest {errors[worst]:.2e}, layer {worst})",
        ),
    ]
    if report.prediction is not None:
        kinds = report.prediction.kinds
        count = sum(kind != "none" for kind in kinds)
        facts.append(("predictors", f"in {count} of {len(kinds)} layers; run --mode predicted uses them"))
    if report.thresholding:
        increase = report.thresholding.increase
        facts.append(
            ("thresholds", f"perplexity {increase:+.2%} where measured; run --mode thresholded uses them")
        )
    print_facts(facts)
