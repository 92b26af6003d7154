"""``powerinfer plan``: decide what is placed where."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from powerinfer_cli import options as opt
from powerinfer_cli.console import emit, emit_json, say
from powerinfer_cli.files import PLAN_SUFFIX, PROFILE_SUFFIX, InputMissing, beside, find_model, output_file

if TYPE_CHECKING:
    from powerinfer_formats.plan import Plan

HELP = """Decide which neurons are hot (on the accelerator) and which are cold (on the CPU), within budgets.

Writes NAME.plan.json and prints what is where, the speed to expect and what limits it. Takes the model's
profile from beside the model. With --shape, no model is needed: a plan for a model and a machine that are not
here.

\b
Examples:
  powerinfer plan -m model.gguf --vram 40MiB
  powerinfer plan -m model.gguf --vram 8GiB --ctx 8192 --hardware pc-high
  powerinfer plan --shape llama-70b-relu --vram 22GiB --hardware pc-high
"""


def command(
    *,
    model: opt.Model = None,
    shape: Annotated[
        str | None,
        typer.Option("--shape", metavar="NAME", help="Plan for a model's shape alone, instead of a file."),
    ] = None,
    profile: Annotated[
        Path | None,
        typer.Option("--profile", metavar="FILE", help="Profile. Without it: the one beside the model."),
    ] = None,
    output: opt.Output = None,
    vram: Annotated[int | None, opt.size_option("--vram", "Memory of the accelerator to use.")] = None,
    ram: Annotated[int | None, opt.size_option("--ram", "Memory of the machine to use.")] = None,
    ctx: Annotated[
        int, typer.Option("--ctx", "-c", min=1, metavar="N", help="Context to reserve memory for, in tokens.")
    ] = 4096,
    hardware: Annotated[
        str | None,
        typer.Option(
            "--hardware",
            metavar="FILE|PRESET",
            help="Hardware profile. Without it: this machine's, or measured now.",
        ),
    ] = None,
    objective: Annotated[
        Literal["time", "frequency"],
        typer.Option("--objective", help="Least time per token, or most activity on the accelerator."),
    ] = "time",
    group: Annotated[
        int, typer.Option("--group", min=1, metavar="N", help="Neurons that move together.")
    ] = 64,
    common: opt.Common,
) -> None:
    """Plan the placement of a model's neurons."""
    from powerinfer_tools.planning import PlanRequest, make_plan

    source = None if shape else find_model(model)
    if source is None and output is None and not common.json:
        say("no --output: the plan is printed, not written")
    request = PlanRequest(
        model=source,
        shape=shape,
        profile=find_profile(profile, source),
        hardware=hardware,
        vram_bytes=vram,
        ram_bytes=ram,
        context=ctx,
        objective=objective,
        group=group,
        threads=common.threads,
    )
    plan = make_plan(request)
    path = output_file(output, source, PLAN_SUFFIX) if source else output
    if path is not None:
        plan.save(path)
        say(f"wrote {path}")
    show(plan, as_json=common.json)


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


def show(plan: "Plan", *, as_json: bool) -> None:
    """The plan as its file's content, or as a table with the verdict."""
    if as_json:
        emit_json(plan.to_document())
        return
    from powerinfer_tools.planning import render_plan

    emit(render_plan(plan))
