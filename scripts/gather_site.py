"""Gather the pages of the site: README as the first page, docs/, and the pages that stand beside the code.

They come from several folders and stand in one, so links between them are rewritten. mkdocs checks them then.

Usage: python scripts/gather_site.py TARGET
"""

import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: Pages outside docs/ → their names on the site.
OTHERS = {
    "README.md": "index.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "SECURITY.md": "SECURITY.md",
    "formats/SPEC.md": "SPEC.md",
}
LINK = re.compile(r"(\]\()([^)\s#]+)")


def on_site(page: Path, link: str) -> str:
    """``link`` of ``page`` as it has to be where all pages stand in one folder."""
    if "://" in link or link.startswith("mailto:"):
        return link
    target = (page.parent / link).resolve()
    name = target.relative_to(ROOT).as_posix() if target.is_relative_to(ROOT) else link
    return OTHERS.get(name) or name.removeprefix("docs/")


def gather(target: Path) -> None:
    """Write every page and picture into ``target``, which is made anew."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(ROOT / "docs", target)
    sources = {ROOT / name: target / page for name, page in OTHERS.items()}
    sources |= {page: target / page.relative_to(ROOT / "docs") for page in (ROOT / "docs").rglob("*.md")}
    for source, page in sources.items():
        text = source.read_text(encoding="utf-8")
        page.write_text(LINK.sub(lambda m, at=source: m[1] + on_site(at, m[2]), text), encoding="utf-8")  # type: ignore[misc]


if __name__ == "__main__":
    gather(Path(sys.argv[1]))
