"""``powerinfer pull``: a model of the hub into its cache."""

from typing import Annotated

import typer

from powerinfer_cli import options as opt
from powerinfer_cli.console import emit, emit_json, progress, say
from powerinfer_cli.sizes import format_size

HELP = """Fetch a model of the Hugging Face hub, or bring it up to date.

OWNER/NAME alone takes Q4_K_M, or the nearest quantisation that the repository has. :QUANT names a
quantisation or a file, and :safetensors takes the directory of weights. Files go into the hub's own cache
(HF_HOME), which other programs share. Cached files are not fetched again, an interrupted download is resumed,
and every file's hash is checked. HF_TOKEN gives access to gated and private models. Prints the path. Other
commands take the model by -hf, without network.

\b
Examples:
  powerinfer pull ggml-org/gemma-3-1b-it-GGUF
  powerinfer pull bartowski/Llama-3.2-3B-Instruct-GGUF:Q4_K_M
  powerinfer pull HuggingFaceTB/SmolLM2-135M-Instruct:safetensors
"""


def command(
    *,
    name: Annotated[str, typer.Argument(metavar="OWNER/NAME[:QUANT]", help="Model of the hub.")],
    common: opt.Common,
) -> None:
    """Fetch a model of the Hugging Face hub."""
    from powerinfer_tools.hub.pulling import pull
    from powerinfer_tools.hub.reference import Reference

    pulled = pull(Reference.parse(name), progress())
    if common.json:
        emit_json(pulled)
        return
    new = f"{format_size(pulled.fetched_bytes)} fetched" if pulled.fetched_bytes else "nothing new"
    say(f"{pulled.reference}: {format_size(pulled.nbytes)} in {len(pulled.files)} file(s), {new}")
    emit(str(pulled.path))
