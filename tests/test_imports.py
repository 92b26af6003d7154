"""Who may import whom: formats and kernels nothing of ours, tools both, cli tools (and file types).

Heavy packages stay out of module level.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "powerinfer_cli": ROOT / "cli/powerinfer_cli",
    "powerinfer_tools": ROOT / "powerinfer_tools",
    "powerinfer_formats": ROOT / "formats/powerinfer_formats",
    "powerinfer_kernels": ROOT / "kernels/powerinfer_kernels",
}
MAY_IMPORT = {
    "powerinfer_formats": set[str](),
    "powerinfer_kernels": set[str](),
    "powerinfer_tools": {"powerinfer_formats", "powerinfer_kernels"},
    "powerinfer_cli": {"powerinfer_tools", "powerinfer_formats"},
}
# Heavy package → the files (by prefix) that are about it and may import it when they are imported.
HEAVY = {
    "torch": (
        "powerinfer_tools/hot/",
        "powerinfer_tools/relufication/",
        "powerinfer_tools/training/tuning.py",
    ),
    "triton": ("kernels/powerinfer_kernels/triton_",),
    "transformers": (),
    "highspy": ("powerinfer_tools/planning/milp.py",),
    "matplotlib": (),
    "lm_eval": ("powerinfer_tools/harness/adapter.py",),
    "gguf": (),
}


def modules() -> list[Path]:
    return sorted(path for folder in PACKAGES.values() for path in folder.rglob("*.py"))


def imported_packages(nodes: Iterator[ast.AST]) -> Iterator[tuple[str, int]]:
    """Top-level names of imported packages with their lines. Relative imports stay inside their package."""
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.split(".")[0], node.lineno
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield (node.module or "").split(".")[0], node.lineno


def at_import_time(tree: ast.Module) -> Iterator[ast.AST]:
    """Nodes that run when the module is imported: not in functions, not under ``if TYPE_CHECKING``."""
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting.extend(node.orelse)
            continue
        yield node
        waiting.extend(ast.iter_child_nodes(node))


def owner_of(path: Path) -> str:
    return next(name for name, folder in PACKAGES.items() if path.is_relative_to(folder))


def test_every_package_is_there() -> None:
    owners = {owner_of(path) for path in modules()}
    assert owners == set(PACKAGES)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_import_direction(path: Path) -> None:
    owner = owner_of(path)
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    # The folders around packages are no packages: `import kernels` would work in this folder alone.
    forbidden = (set(PACKAGES) - MAY_IMPORT[owner] - {owner}) | {"cli", "formats", "kernels", "tests"}
    wrong = [f"line {line}: {name}" for name, line in imported_packages(ast.walk(tree)) if name in forbidden]
    assert not wrong, f"{owner} must not import these: {wrong}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_heavy_packages_are_not_imported_at_module_level(path: Path) -> None:
    relative = path.relative_to(ROOT).as_posix()
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    wrong = [
        f"line {line}: {name}"
        for name, line in imported_packages(at_import_time(tree))
        if name in HEAVY and not relative.startswith(HEAVY[name] or ("\0",))
    ]
    assert not wrong, f"import these inside the function that uses them: {wrong}"


def test_no_package_in_the_folders_around_packages() -> None:
    """An ``__init__.py`` there would make import names such as ``kernels`` that collide with other wheels."""
    for folder in ("cli", "formats", "kernels", "tests"):
        assert not (ROOT / folder / "__init__.py").exists()


def test_importing_the_stages_package_loads_nothing_heavy() -> None:
    probe = "import sys, powerinfer_tools; print([m for m in sys.argv[1].split() if m in sys.modules])"
    environment = {"PYTHONPATH": ":".join([str(ROOT), *(str(p.parent) for p in PACKAGES.values())])}
    names = " ".join([*HEAVY, "numpy", "rich", "typer", "tokenizers", "jinja2"])
    result = subprocess.run(
        [sys.executable, "-c", probe, names], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
