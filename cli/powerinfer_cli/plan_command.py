"""``powerinfer plan``: decide what is placed where."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from powerinfer_cli import options as opt
from powerinfer_cli.console import emit, emit_json, progress, say
from powerinfer_cli.files import (
    PLAN_SUFFIX,
    PREDICTORS_SUFFIX,
    PROFILE_SUFFIX,
    THRESHOLDS_SUFFIX,
    InputMissing,
    beside,
    find_model,
    optional_input,
    output_file,
)
from powerinfer_cli.tables import print_table

if TYPE_CHECKING:
    from powerinfer_formats.plan import Plan
    from powerinfer_tools.stages.plan import PlanRequest
    from powerinfer_tools.stages.plan.verification_rows import Verification

HELP = """Decide which neurons, or experts, are hot (on the accelerator) and which are cold (on the CPU).

Writes NAME.plan.json. Prints the placement within the budgets, the expected speed and the limiting resource.
Takes the profile, and predictors and thresholds if they exist, from beside the model. Modes are exact unless
--max-ppl-increase allows a measured loss. --shape plans for a model of which you have no file, and --hardware
for a machine that you do not have.

\b
Examples:
  powerinfer plan -m model.gguf --vram 72MiB
  powerinfer plan -m model.gguf --vram 8GiB --ctx 8192 --hardware pc-high
  powerinfer plan -m model.relu.gguf --max-ppl-increase 0.02
  powerinfer plan --shape opt-30b --dtype f16 --hardware pc-high --chart opt-30b.svg
  powerinfer plan -m model.gguf --verify --json
  powerinfer plan --list
"""


def command(
    *,
    model: opt.ModelChoice,
    shape: Annotated[
        str | None,
        typer.Option(
            "--shape", metavar="NAME", help="Plan for the shape of a well-known model, without a file."
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option("--dtype", metavar="TYPE", help="With --shape: row type of its matrices.")
    ] = "q4_0",
    profile: opt.Profile = None,
    predictors: opt.Predictors = None,
    thresholds: opt.Thresholds = None,
    no_predictors: Annotated[
        bool, typer.Option("--no-predictors", help="Plan without predictors, even if they exist.")
    ] = False,
    max_ppl_increase: Annotated[
        float,
        typer.Option(
            "--max-ppl-increase",
            min=0.0,
            max=1.0,
            metavar="SHARE",
            help="Relative increase of perplexity that predictors or thresholds may cause: 0.01 is 1 "
            "%; 0: exact modes only.",
        ),
    ] = 0.0,
    output: opt.Output = None,
    vram: Annotated[int | None, opt.size_option("--vram", "Memory of the accelerator to use.")] = None,
    ram: Annotated[
        int | None,
        opt.size_option(
            "--ram",
            "Memory of the machine to use; experts that do not fit stay on disk. Without it:"
            " the free memory.",
        ),
    ] = None,
    ctx: Annotated[
        int | None,
        typer.Option(
            "--ctx",
            "-c",
            min=1,
            metavar="N",
            help="Context to reserve memory for, in tokens. Without it: the model's, up to 4096.",
        ),
    ] = None,
    kv_type: Annotated[
        opt.KVType, typer.Option("--kv-type", help="KV cache to reserve memory for, as run's --kv-type.")
    ] = "f16",
    hardware: Annotated[
        str | None,
        typer.Option(
            "--hardware",
            metavar="FILE|PRESET",
            help="Hardware profile to plan for: a file, pc-high or pc-low. Without it: this machine's"
            " (doctor --measure).",
        ),
    ] = None,
    objective: Annotated[
        Literal["time", "frequency"],
        typer.Option(
            "--objective",
            help="time: least time for the request; frequency: most activity on the accelerator.",
        ),
    ] = "time",
    prompt: Annotated[
        int,
        typer.Option(
            "--prompt",
            min=0,
            metavar="N",
            help="The plan minimises the time of a request with a prompt of N tokens; 0: only of "
            "generated tokens.",
        ),
    ] = 1000,
    generate: Annotated[
        int, typer.Option("--generate", min=1, metavar="N", help="Tokens that this request generates.")
    ] = 300,
    list_names: Annotated[
        bool, typer.Option("--list", help="List the known shapes, row types and machines, and end.")
    ] = False,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Measure the model here with several splits and modes, and compare with the cost "
            "model's predictions. If --ram is too small for the model, from disk. Writes no "
            "plan.",
        ),
    ] = False,
    chart: Annotated[
        Path | None,
        typer.Option(
            "--chart", metavar="FILE", help="Draw the plan and other placements into a .png or .svg file."
        ),
    ] = None,
    group: Annotated[
        int,
        typer.Option("--group", min=1, metavar="N", help="Neurons in a group; groups are placed as a whole."),
    ] = 64,
    common: opt.Common,
) -> None:
    """Decide what runs where, and predict the speed."""
    if list_names:
        show_names(as_json=common.json)
        return
    if shape is not None and model.given:
        raise typer.BadParameter("choose one of --model and --shape", param_hint="--shape")
    source = None if shape is not None else find_model(model)
    path = output if source is None else output_file(output, source, PLAN_SUFFIX)
    measured = find_profile(profile, source)
    if no_predictors and predictors is not None:
        raise typer.BadParameter("choose one of --predictors and --no-predictors", param_hint="--predictors")
    if source is not None and not no_predictors:
        predictors = optional_input(predictors, source, PREDICTORS_SUFFIX, made_by="train")
    if source is not None:
        thresholds = optional_input(thresholds, source, THRESHOLDS_SUFFIX, made_by="threshold")
    if verify and (source is None or measured is None):
        raise typer.BadParameter("measures a model; name one with --model", param_hint="--verify")
    from powerinfer_tools.stages.plan import PlanRequest, make_plan

    request = PlanRequest(
        model=source,
        shape=shape,
        dtype=dtype,
        profile=measured,
        predictors=predictors,
        thresholds=thresholds,
        no_predictors=no_predictors,
        max_ppl_increase=max_ppl_increase,
        hardware=hardware,
        vram_bytes=vram,
        ram_bytes=ram,
        context=ctx,
        kv_type=kv_type,
        objective=objective,
        prompt=prompt,
        generate=generate,
        group=group,
        threads=common.threads,
    )
    plan = make_plan(request)
    if verify:
        show_verification(verification(request, plan), as_json=common.json)
        return
    if path is not None:
        plan.save(path)
    if chart is not None:
        from powerinfer_tools.stages.plan.picture import draw_predictions

        draw_predictions(plan, chart)
        say(f"wrote {chart}")
    show(plan, as_json=common.json)
    say(f"wrote {path}" if path is not None else "not written: name a file with -o to keep it")


def verification(request: "PlanRequest", plan: "Plan") -> "Verification":
    """What the model takes here, beside ``plan``: from disk, where that has experts there."""
    assert request.model is not None
    assert request.profile is not None
    if plan.memory.disk_used:
        from powerinfer_tools.stages.plan.verification_from_disk import verify_from_disk

        return verify_from_disk(request, progress=progress())
    from powerinfer_tools.stages.plan.verification import verify

    return verify(
        request.model,
        request.profile,
        plan,
        predictors=request.predictors,
        threads=request.threads,
        progress=progress(),
    )


def find_profile(named: Path | None, model: Path | None) -> Path | None:
    """The profile to plan with: the one named, else the one beside the model; none for a shape alone."""
    if named is None and model is not None:
        named = beside(model, PROFILE_SUFFIX)
        if not named.is_file():
            raise InputMissing(
                f"{named}: no such file; make it with: powerinfer profile -m {model} --corpus FILE"
            )
        say(f"using {named}")
    return named


def show_names(*, as_json: bool) -> None:
    """What --shape, --dtype and --hardware take."""
    from powerinfer_tools.measure.hardware.presets import PRESETS
    from powerinfer_tools.model.published import DTYPES, PUBLISHED

    names = {"shapes": list(PUBLISHED), "dtypes": list(DTYPES), "hardware": list(PRESETS)}
    if as_json:
        emit_json(names)
        return
    for heading, choices in names.items():
        emit(f"{heading}: {', '.join(choices)}")


def show_verification(verification: "Verification", *, as_json: bool) -> None:
    """Predicted beside measured, a row for every split and mode."""
    if as_json:
        emit_json(verification.as_dict())
        return
    routed = any(row.measured_choices is not None for row in verification.rows)
    chosen = ("chosen, expected", "measured") if routed else ()
    share = "in memory" if verification.rows[0].device == "disk" else "hot"
    headings = ("device", "mode", share, *chosen, "predicted ms", "measured ms", "spread", "error")
    rows = [
        (
            row.device,
            row.mode,
            f"{row.hot_share:.0%}",
            *(f"{share:.0%}" for share in (row.predicted_choices, row.measured_choices) if share is not None),
            f"{1e3 * row.predicted_seconds:.2f}",
            f"{1e3 * row.measured_seconds:.2f}",
            f"{row.spread:.0%}",
            f"{row.error:+.0%}",
        )
        for row in verification.rows
    ]
    print_table(headings, rows)
    emit(f"median error {verification.median_error:.0%}")
    for note in verification.notes:
        say(note)


def show(plan: "Plan", *, as_json: bool) -> None:
    """The plan as its file's content, or as a table with the verdict."""
    if as_json:
        emit_json(plan.to_document())
        return
    from powerinfer_tools.stages.plan import render_plan

    emit(render_plan(plan))
