"""``powerinfer doctor``: what this machine is, and what it can do."""

from pathlib import Path
from typing import Annotated

import typer

from powerinfer_cli import options as opt
from powerinfer_cli.console import emit_json, progress, say
from powerinfer_cli.files import find_model
from powerinfer_cli.tables import print_facts

HELP = """Show this machine's processor, instruction sets, memory and accelerator.

--measure measures memory bandwidth, also of scattered reads, and the speed of sparse FFNs. Of a CUDA device,
it measures its memory, the link to it, the cost of launches and waits, and its kernels by row type. The
lowest, the median and the highest of the passes go into the hardware profile that plan uses. With -m, it
measures FFNs of the model's own shape, and the disk that holds the model: streams, and single reads.

\b
Examples:
  powerinfer doctor
  powerinfer doctor --measure
  powerinfer doctor --measure -m model.gguf
"""


def command(
    *,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure, and write the hardware profile.")
    ] = False,
    model: Annotated[
        list[Path] | None,
        typer.Option(
            "--model",
            "-m",
            metavar="FILE",
            help="Measure FFNs of this source model's shape, and its disk; may be repeated. Without "
            "it: 4096x14336 in Q4_0.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Hardware profile to write. Without it: the file that plan reads.",
        ),
    ] = None,
    common: opt.Common,
) -> None:
    """Show this machine, or measure it."""
    if model and not measure:
        raise typer.BadParameter("has an effect only with --measure", param_hint="--model")
    models = [find_model(path) for path in model or ()]
    from powerinfer_tools.measure.hardware import diagnose

    result = diagnose(measure=measure, models=models, threads=common.threads, progress=progress())
    written = None
    if result.profile is not None:
        from powerinfer_tools.measure.hardware import default_profile_path

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
