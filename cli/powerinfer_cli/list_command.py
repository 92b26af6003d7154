"""``powerinfer list``: the models that the hub's cache holds."""

from powerinfer_cli import options as opt
from powerinfer_cli.console import emit_json, say
from powerinfer_cli.sizes import format_size
from powerinfer_cli.tables import print_table

HELP = """List the models that were fetched from the Hugging Face hub, by this program or another.

Reads only the hub's cache (HF_HOME). -hf and rm take the names that it prints. Incomplete models are left
out.

\b
Examples:
  powerinfer list
  powerinfer list --json
"""


def command(*, common: opt.Common) -> None:
    """List the models that were fetched."""
    from powerinfer_tools.hub.cached import hub_cache, incomplete_bytes, list_models

    models, partial = list_models(), incomplete_bytes()
    if common.json:
        emit_json({"models": models, "incomplete_bytes": partial})
        return
    rows = [
        (model.reference, format_size(model.nbytes), model.commit[:8] + ("" if model.current else ", older"))
        for model in models
    ]
    if rows:
        print_table(("model", "size", "commit"), rows)
    else:
        say(f"no model in {hub_cache()}; fetch one with: powerinfer pull OWNER/NAME")
    if partial:
        say(f"{format_size(partial)} of interrupted downloads: pull resumes them, rm removes them")
