"""``powerinfer doctor``: what this machine is, and what it can do."""

from pathlib import Path
from typing import Annotated

import typer

from powerinfer_cli import options as opt
from powerinfer_cli.console import emit_json, progress, say
from powerinfer_cli.tables import print_facts

HELP = """Look at this machine: processor, instruction sets, memory, accelerator.

With --measure, measure memory bandwidth (also of scattered reads) and write the hardware profile that plan
uses.

\b
Examples:
  powerinfer doctor
  powerinfer doctor --measure
"""


def command(
    *,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure, and write the hardware profile.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Hardware profile to write. Without it: where plan looks for it.",
        ),
    ] = None,
    common: opt.Common,
) -> None:
    """Diagnose this machine."""
    from powerinfer_tools.hardware import diagnose

    result = diagnose(measure=measure, threads=common.threads, progress=progress())
    written = None
    if result.profile is not None:
        from powerinfer_tools.hardware import default_profile_path

        written = output or default_profile_path()
        if output is None:
            written.parent.mkdir(parents=True, exist_ok=True)
        result.profile.save(written)
    if common.json:
        emit_json({"path": written, **result.facts, "warnings": result.warnings})
        return
    print_facts(result.lines)
    for warning in result.warnings:
        say(f"warning: {warning}")
    if written is not None:
        say(f"wrote {written}")
