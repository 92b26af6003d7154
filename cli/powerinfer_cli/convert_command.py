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
    TRACE_SUFFIX,
    find_model,
    optional_input,
    output_file,
    stage_input,
)
from powerinfer_cli.sizes import format_size
from powerinfer_cli.tables import print_facts
from powerinfer_formats.block_types import WrittenType

if TYPE_CHECKING:
    from collections.abc import Sequence

    from powerinfer_formats.predictors import Quality
    from powerinfer_tools.stages.convert.conversion import ConvertedExperts, ConvertReport
    from powerinfer_tools.stages.original.export import ExportReport

HELP = """Write the split file: neurons, or experts, sorted hottest first, as the plan says.

Takes the plan and the profile, and predictors and thresholds if they exist, from beside the model. Gate and
up rows keep their bits. The down projection is transposed and quantised again, and the error of this is
measured and printed. Experts keep all their bits.

--format powerinfer writes NAME.original.powerinfer.gguf for the original PowerInfer instead: a ReLU model of
the families that it supports, without a plan. Predictors of train are converted into its form with the trace
beside the model, and measured on it.

\b
Examples:
  powerinfer convert -m model.gguf
  powerinfer convert -m model.gguf --plan small.plan.json -o small.powerinfer.gguf
  powerinfer convert -m model.relu.gguf --format powerinfer --quant Q4_0
"""

ORIGINAL_SUFFIX = ".original.powerinfer.gguf"
_exporting = opt.in_panel("Export (--format powerinfer)")


def command(
    *,
    ctx: typer.Context,
    model: opt.ModelChoice,
    plan: Annotated[
        Path | None,
        typer.Option("--plan", metavar="FILE", help="Plan. Without it: the one beside the model."),
    ] = None,
    profile: opt.Profile = None,
    predictors: opt.Predictors = None,
    thresholds: opt.Thresholds = None,
    other_profile: Annotated[
        bool,
        typer.Option(
            "--other-profile",
            help="Convert even if the plan was made from another profile: hot counts come from the "
            "plan, the order of neurons from this profile.",
        ),
    ] = False,
    anyway: Annotated[
        bool,
        typer.Option(
            "--anyway",
            help="Write the file even if it is larger than its source and its plan skips no neuron "
            "and uses no accelerator.",
        ),
    ] = False,
    output: opt.Output = None,
    quant: Annotated[
        Literal["auto", WrittenType],
        typer.Option(
            "--quant",
            help="Type of the transposed down projection; auto: Q8_0 if the source is quantised. With"
            " --format powerinfer: type of all FFN matrices, F16 or Q4_0.",
        ),
    ] = "auto",
    form: Annotated[
        Literal["split", "powerinfer"],
        typer.Option(
            "--format", help="split: a split file; powerinfer: a model for the original PowerInfer."
        ),
    ] = "split",
    trace: Annotated[
        Path | None,
        _exporting("--trace", metavar="FILE", help="Trace. Without it: the one beside the model."),
    ] = None,
    all_active: Annotated[
        bool,
        _exporting(
            "--all-active", help="Write no predictors: every neuron is computed, which is exact and slow."
        ),
    ] = False,
    common: opt.Common,
) -> None:
    """Write the split file of a plan."""
    source = find_model(model)
    if form == "powerinfer":
        opt.refuse_beside(ctx, "--format powerinfer", "plan", "profile", "other_profile", "anyway")
        if all_active:
            opt.refuse_beside(ctx, "--all-active", "predictors", "trace")
        write_original(source, output, quant, predictors, trace, all_active=all_active, as_json=common.json)
        return
    opt.refuse_beside(ctx, "--format split", "trace", "all_active")
    plan_file = stage_input(plan, source, PLAN_SUFFIX, made_by="plan")
    profile_file = stage_input(profile, source, PROFILE_SUFFIX, made_by="profile")
    predictor_file = optional_input(predictors, source, PREDICTORS_SUFFIX, made_by="train")
    threshold_file = optional_input(thresholds, source, THRESHOLDS_SUFFIX, made_by="threshold")
    path = output_file(output, source, SPLIT_SUFFIX)
    say_verdict(source, plan_file, anyway=anyway or bool(predictor_file or threshold_file))
    from powerinfer_tools.stages.convert.conversion import ConvertOptions, convert

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
            other_profile=other_profile,
        ),
        progress(),
    )
    show(report, as_json=common.json)


def say_verdict(source: Path, plan_file: Path, *, anyway: bool) -> None:
    """What the split file will be on this machine, before it is written.

    Raises ConvertError, unless ``anyway``, for one that takes more room than its source for nothing.
    """
    from powerinfer_formats.plan import Plan
    from powerinfer_tools.errors import ConvertError
    from powerinfer_tools.inspect.advice import split_verdict

    verdict = split_verdict(source, Plan.load(plan_file))
    if verdict.in_vain and not anyway:
        raise ConvertError(
            f"{plan_file} computes every layer dense on the CPU, so the split file would have the source's "
            f"speed and take {verdict.growth:.2f} × its bytes: run {source} as it is (--anyway writes the "
            "file)"
        )
    if verdict.text:
        say(f"the split file: {verdict.text}")


def write_original(
    source: Path,
    output: Path | None,
    quant: str,
    predictors: Path | None,
    trace: Path | None,
    *,
    all_active: bool,
    as_json: bool,
) -> None:
    """Export a model, and say what came of it."""
    if quant not in ("auto", "F16", "Q4_0"):
        raise typer.BadParameter("with --format powerinfer: F16 or Q4_0", param_hint="--quant")
    predictors_path = (
        None if all_active else stage_input(predictors, source, PREDICTORS_SUFFIX, made_by="train")
    )
    records = None if all_active else optional_input(trace, source, TRACE_SUFFIX, made_by="profile")
    path = output_file(output, source, ORIGINAL_SUFFIX)
    from powerinfer_tools.stages.original.export import ExportOptions, export

    chosen = None if quant == "auto" else quant
    report = export(ExportOptions(source, path, predictors_path, records, chosen), progress())
    show_export(report, as_json=as_json)


def show_export(report: "ExportReport", *, as_json: bool) -> None:
    """What was written, and what its predictors are worth."""
    if as_json:
        emit_json(report.as_dict())
        return
    say(f"wrote {report.output}")
    errors, ranks = report.requantization_error, report.predictor_ranks
    facts = [
        ("size", f"{format_size(report.nbytes)} (source {format_size(report.source_bytes)})"),
        ("down projection", f"{report.down_type}, relative error {sum(errors) / len(errors):.2e}"),
        ("predictors", f"{report.predictors}, {min(ranks)} to {max(ranks)} wide"),
        ("their size", format_size(report.predictor_bytes)),
    ]
    if report.quality:
        before, after = report.source_quality, report.quality
        facts += [
            (name, f"{_mean(after, field):.1%} (before: {_mean(before, field):.1%})")
            for name, field in (("recall", "recall"), ("predicted density", "predicted_density"))
        ]
        facts.append(("true density", f"{_mean(after, 'density'):.1%}, on tokens not learnt from"))
    print_facts(facts)


def _mean(qualities: "Sequence[Quality]", field: str) -> float:
    return float(sum(getattr(quality, field) for quality in qualities)) / len(qualities)


def expert_facts(report: "ConvertReport", experts: "ConvertedExperts") -> list[tuple[str, str]]:
    """What was written of a mixture of experts."""
    hot, count = sum(experts.hot), experts.count * len(experts.hot)
    facts = [
        ("size", f"{format_size(report.nbytes)} (source {format_size(report.source_bytes)})"),
        ("hot experts", f"{hot:,} of {count:,} ({hot / count:.1%})"),
    ]
    if experts.hot_shared:
        facts.append(("hot shared experts", f"{sum(experts.hot_shared)} of {len(experts.hot)}"))
    dense = report.layers - len(experts.hot)
    kept = "matrices of experts" if dense else "all matrices"
    facts += [*_also_hot(report), (kept, "the source's bits")]
    if dense:
        hot = sum(report.hot_neurons) - hot * report.neurons // experts.count
        worst = max(report.requantization_error)
        facts.append(("layers without experts", f"{dense}, with {hot:,} hot neurons"))
        facts.append(("their down projections", f"transposed, with a relative error of up to {worst:.2e}"))
    return facts


def _also_hot(report: "ConvertReport") -> list[tuple[str, str]]:
    """What is on the hot device besides neurons, or experts."""
    devices = report.devices
    if devices is None or devices.all_cpu:
        return []
    parts = [
        f"{what} of {places.count('gpu')} layers"
        for what, places in (("attention", devices.attention), ("predictors", devices.predictor))
        if "gpu" in places
    ]
    return [("also hot", ", ".join([*parts, *(["the head"] if devices.head == "gpu" else [])]))]


def show(report: "ConvertReport", *, as_json: bool) -> None:
    """What was written and what the requantisation costs."""
    if as_json:
        emit_json(report.as_dict())
        return
    say(f"wrote {report.output}")
    if report.experts is not None:
        print_facts(expert_facts(report, report.experts))
        return
    errors = report.requantization_error
    worst = max(range(report.layers), key=lambda layer: errors[layer])
    hot, neurons = sum(report.hot_neurons), report.neurons * report.layers
    facts = [
        ("size", f"{format_size(report.nbytes)} (source {format_size(report.source_bytes)})"),
        ("hot neurons", f"{hot:,} of {neurons:,} ({hot / neurons:.1%})"),
        *_also_hot(report),
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
