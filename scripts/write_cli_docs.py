"""Write docs/cli.md: the ``--help`` of every command, so that the page cannot drift from the program.

Usage: python scripts/write_cli_docs.py [FILE]      (a test compares the file with what this would write)
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

from typer.testing import CliRunner

from powerinfer_cli.app import COMMANDS, create_app

HEAD = """# The `powerinfer` command

Made by `make docs` from the `--help` of every command.
"""
NESTED = {"profile": ("merge",)}


def commands() -> Iterator[tuple[str, ...]]:
    """Every command as words, the program itself first."""
    yield ()
    for name in COMMANDS:
        yield (name,)
        for nested in NESTED.get(name, ()):
            yield name, nested


def page() -> str:
    """The page's text."""
    parts = [HEAD]
    os.environ["COLUMNS"] = "100"
    app = create_app()
    for words in commands():
        result = CliRunner().invoke(app, [*words, "--help"], prog_name="powerinfer")
        if result.exit_code != 0:
            raise RuntimeError(f"{' '.join(words)} --help ended with {result.exit_code}: {result.output}")
        parts.append(f"## `{' '.join(('powerinfer', *words))}`\n\n```text\n{result.stdout.rstrip()}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    Path(sys.argv[1] if len(sys.argv) > 1 else "docs/cli.md").write_text(page(), encoding="utf-8")
