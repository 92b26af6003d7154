"""``powerinfer advise``: what to do with a model on this machine."""

from typing import TYPE_CHECKING, Annotated

import typer

from powerinfer_cli import options as opt
from powerinfer_cli.console import emit, emit_json, say
from powerinfer_cli.files import PROFILE_SUFFIX, find_model, optional_input
from powerinfer_cli.sizes import format_size
from powerinfer_cli.tables import print_facts, print_table

if TYPE_CHECKING:
    from powerinfer_tools.inspect.advice import Advice, Way

HELP = """Say whether preparing a model pays on this machine, or whether to just run it.

Reads the model's header, this machine's hardware profile (doctor --measure; without one, this machine is
measured for a second) and the model's profile, if it exists. Prints which parts fit where, the expected speed
of each way of running, and a verdict with the commands. Speeds are predictions; bench measures.

\b
Examples:
  powerinfer advise -m model.gguf
  powerinfer advise -m model.gguf --hardware pc-low --json
"""


def command(
    *,
    model: opt.ModelChoice,
    profile: opt.Profile = None,
    hardware: Annotated[
        str | None,
        typer.Option(
            "--hardware",
            metavar="FILE|PRESET",
            help="Advise for another machine: a hardware profile, pc-high or pc-low. Without it: for "
            "this one.",
        ),
    ] = None,
    common: opt.Common,
) -> None:
    """Say whether preparing a model pays on this machine."""
    path = find_model(model)
    counted = optional_input(profile, path, PROFILE_SUFFIX, made_by="profile")
    from powerinfer_tools.inspect.advice import advise

    advice = advise(path, profile=counted, hardware=hardware)
    if common.json:
        emit_json(advice.as_dict())
        return
    show(advice)


def show(advice: "Advice") -> None:
    """Facts, ways and verdict."""
    zeros = "yes: idle neurons can be skipped exactly" if advice.true_zeros else "no"
    fits = "fits" if advice.fits else "does not fit"
    free = format_size(advice.free_bytes) if advice.free_bytes else "unknown"
    facts = [
        ("model", advice.model),
        ("family", f"{advice.family}, {advice.activation}"),
        ("true zeros", zeros),
        *([("experts", advice.experts)] if advice.experts else []),
        ("weights", format_size(advice.weight_bytes)),
        ("KV cache", f"{format_size(advice.cache_bytes)} for {advice.context:,} tokens"),
        ("memory", f"{free} free: {fits}"),
        ("machine", advice.machine),
        ("accelerator", advice.accelerator),
    ]
    print_facts(facts)
    print_table(
        ("way", "expected tok/s", "answers", "preparation", "why"), [way_row(way) for way in advice.ways]
    )
    emit(advice.verdict)
    if advice.notice:
        say(advice.notice)


def way_row(way: "Way") -> tuple[str, ...]:
    """A way's cells for the table."""
    speed = "–" if way.tokens_per_second is None else f"{way.tokens_per_second:.1f}"
    time = f"about {way.minutes:.0f} min" if way.minutes >= 1 else "none" if not way.minutes else "a minute"
    return way.name, speed, "the same" if way.exact else "changed", time, way.detail
