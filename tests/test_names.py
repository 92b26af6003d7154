"""Names are nouns: a participle says what was done to a value, and not what it is."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("powerinfer", "powerinfer_tools", "cli", "formats")
RIDDLES = frozenset({"found", "known", "told", "given", "there", "wanted", "asked"})


def bound_names(tree: ast.AST) -> list[tuple[str, int]]:
    """Names of variables, fields and parameters, with the lines where they are bound."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.append((node.id, node.lineno))
        elif isinstance(node, ast.arg):
            names.append((node.arg, node.lineno))
    return names


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_name_is_a_participle(folder: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for name, line in bound_names(ast.parse(path.read_text(encoding="utf-8")))
        if name in RIDDLES
    ]
    assert not wrong, "say what these hold:\n" + "\n".join(wrong)
