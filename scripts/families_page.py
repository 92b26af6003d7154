"""Writes docs/families.md from the architecture table: without ``--write``, the page is printed. A test holds
the page against the table."""

import sys
from pathlib import Path

from powerinfer_tools.inspect.families import supported_families
from powerinfer_tools.model.architectures import REFUSED
from powerinfer_tools.model.huggingface.families import FAMILIES

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/families.md"
HEAD = """# Model families

Written by `python scripts/families_page.py --write` from the table that the program itself reads;
`powerinfer inspect --families` prints it, too. The first column is what a GGUF file says in
`general.architecture`, the last the model types of Hugging Face directories (`model_type` of config.json).
With **true zeros**, skipping changes no bit; a file may name another activation than its family's.

| family | activation | true zeros | FFN | mixes tokens by | Hugging Face |
|---|---|---|---|---|---|
"""
REST = """
## Families that do not run

They are known, and refused with the operation that is missing.

| family | why |
|---|---|
"""


def page() -> str:
    """The page."""
    types: dict[str, list[str]] = {}
    for family in FAMILIES.values():
        types.setdefault(family.architecture, []).append(family.model_type)
    rows = [
        f"| {row.name} | {row.activation} | {'yes' if row.true_zeros else ''} | {row.ffn} | {row.mixer} | "
        f"{', '.join(sorted(types.get(row.name, [])))} |"
        for row in supported_families()
    ]
    refused = [f"| {name} | {why} |" for name, why in sorted(REFUSED.items())]
    return HEAD + "\n".join(rows) + "\n" + REST + "\n".join(refused) + "\n"


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        print(page(), end="")
