"""Promises of README and docs: links resolve, commands exist, pictures show what the log says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "formats/SPEC.md"])
# Not the log, which says what was run on a day, nor what the program says itself.
INSTRUCTIONS = [page for page in PAGES if page.name not in {"LOG.md", "cli.md"}]
LINK = re.compile(r"(?<!\\)!?\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ +(.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_internal_links_resolve(page: Path) -> None:
    text = CODE.sub("", page.read_text(encoding="utf-8"))
    broken = []
    for link in LINK.findall(text):
        if link.startswith(("https://", "http://", "mailto:")):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def test_a_broken_link_would_be_seen() -> None:
    assert LINK.findall("see [this](none.md#here) and ![a picture](x.svg)") == ["none.md#here", "x.svg"]
    assert "is-it-for-you" in anchors(ROOT / "README.md")


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("page", INSTRUCTIONS, ids=name_of)
def test_commands_in_examples_exist(page: Path) -> None:
    from powerinfer_cli.app import COMMANDS

    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    named = {
        name
        for block in blocks
        for name in re.findall(r"^ *(?:\S*/)?powerinfer +([a-z]+)", block, re.MULTILINE)
    }
    assert not named - set(COMMANDS)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_make_targets_in_examples_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    text = page.read_text(encoding="utf-8")
    named = {word for words in re.findall(r"`make ((?:[a-z-]+ ?)+)`", text) for word in words.split()}
    assert not named - targets


def test_speed_chart_shows_the_figures_of_the_log(tmp_path: Path) -> None:
    drawn = tmp_path / "speed.svg"
    subprocess.run([sys.executable, str(ROOT / "scripts/draw_speed_chart.py"), str(drawn)], check=True)
    assert drawn.read_bytes() == (ROOT / "docs/pictures/speed.svg").read_bytes()
