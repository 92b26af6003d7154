"""``powerinfer rm``: a fetched model out of the hub's cache."""

from typing import Annotated

import typer

from powerinfer_cli import options as opt
from powerinfer_cli.console import emit_json, say
from powerinfer_cli.sizes import format_size

HELP = """Remove a model that was fetched from the Hugging Face hub, and its partial downloads.

The cache is the hub's own: other programs that use the model fetch it again. If a whole repository is
removed, files that a stage wrote beside its models are removed, too.

\b
Examples:
  powerinfer rm bartowski/Llama-3.2-3B-Instruct-GGUF:Q4_K_M
  powerinfer rm bartowski/Llama-3.2-3B-Instruct-GGUF --all
"""


def command(
    *,
    name: Annotated[str, typer.Argument(metavar="OWNER/NAME[:QUANT]", help="Model, as list shows it.")],
    everything: Annotated[
        bool, typer.Option("--all", help="Remove all that was fetched of OWNER/NAME.")
    ] = False,
    common: opt.Common,
) -> None:
    """Remove a fetched model."""
    from powerinfer_tools.hub.cached import remove
    from powerinfer_tools.hub.reference import Reference

    freed = remove(Reference.parse(name), everything=everything)
    if common.json:
        emit_json({"freed_bytes": freed})
    else:
        say(f"removed {name}: {format_size(freed)} free")
