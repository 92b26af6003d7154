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
    "powerinfer": ROOT / "powerinfer",
    "powerinfer_cli": ROOT / "cli/powerinfer_cli",
    "powerinfer_tools": ROOT / "powerinfer_tools",
    "powerinfer_formats": ROOT / "formats/powerinfer_formats",
    "powerinfer_kernels": ROOT / "kernels/powerinfer_kernels",
}
MAY_IMPORT = {
    "powerinfer_formats": set[str](),
    "powerinfer_kernels": set[str](),
    "powerinfer_tools": {"powerinfer_formats", "powerinfer_kernels"},
    "powerinfer": {"powerinfer_tools", "powerinfer_formats"},
    "powerinfer_cli": {"powerinfer", "powerinfer_tools", "powerinfer_formats"},
}
# Heavy package → the files (by prefix) that are about it and may import it when they are imported.
HEAVY = {
    "torch": (
        "powerinfer_tools/engine/hot/",
        "powerinfer_tools/measure/accelerator.py",
        "powerinfer_tools/stages/relufy/",
        "powerinfer_tools/stages/train/tuning.py",
    ),
    "triton": ("kernels/powerinfer_kernels/triton_",),
    "transformers": (),
    "highspy": ("powerinfer_tools/stages/plan/milp.py",),
    "matplotlib": (),
    "lm_eval": ("powerinfer_tools/quality/harness/adapter.py",),
    "gguf": (),
    "huggingface_hub": (),
    "starlette": ("powerinfer_tools/serving/",),
    "uvicorn": ("powerinfer_tools/serving/",),
    "pydantic": ("powerinfer_tools/serving/",),
    "prometheus_client": ("powerinfer_tools/serving/",),
    "llguidance": (),
    "ray": (),
}

# The floors of powerinfer_tools, ground first. A room imports what stands before it, and nothing behind it.
FLOORS = (
    ("errors", "progress", "interrupts", "pictures", "detect"),
    ("hub",),
    ("text",),
    ("model",),
    ("engine",),
    ("generate",),
    ("serving",),
    ("quality",),
    ("measure",),
    ("stages",),
    ("inspect",),
)
# Stages that use another stage; no stage may be used by one that it uses.
STAGES = ("profile", "train", "threshold", "convert", "quantize", "plan", "relufy", "original")


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


def names_imported(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Full dotted names of what is imported anywhere, lazily and for types alone, too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports hide where they lead"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def tools_imports(path: Path) -> Iterator[tuple[str, int]]:
    """The modules of powerinfer_tools that ``path`` imports, by dotted name below the package, with lines."""
    root = PACKAGES["powerinfer_tools"]
    for name, line in names_imported(ast.parse(path.read_text(encoding="utf-8"))):
        parts = name.split(".")
        if parts[0] != "powerinfer_tools":
            continue
        while parts and not module_file(root, parts[1:]):
            parts = parts[:-1]
        if parts[1:]:
            yield ".".join(parts[1:]), line


def module_file(root: Path, parts: list[str]) -> Path | None:
    module = root.joinpath(*parts)
    files = (module.with_suffix(".py"), module / "__init__.py") if parts else (root / "__init__.py",)
    return next((file for file in files if file.exists()), None)


def tools_modules() -> list[Path]:
    return [path for path in modules() if path.is_relative_to(PACKAGES["powerinfer_tools"])]


def dotted(path: Path) -> str:
    parts = path.relative_to(PACKAGES["powerinfer_tools"]).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_every_room_has_a_floor() -> None:
    rooms = {dotted(path).split(".")[0] for path in tools_modules()} - {""}
    assert rooms == {room for floor in FLOORS for room in floor}


def test_rooms_import_only_what_stands_before_them() -> None:
    floor_of = {room: number for number, floor in enumerate(FLOORS) for room in floor}
    wrong = []
    for path in tools_modules():
        if not (room := dotted(path).split(".")[0]):
            continue
        for name, line in tools_imports(path):
            if floor_of[name.split(".")[0]] > floor_of[room]:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_stages_use_only_stages_before_them() -> None:
    wrong = []
    for path in tools_modules():
        here = dotted(path).split(".")
        if here[0] != "stages" or len(here) < 2:
            continue
        for name, line in tools_imports(path):
            there = name.split(".")
            if there[0] == "stages" and STAGES.index(there[1]) > STAGES.index(here[1]):
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_no_two_modules_import_each_other_in_a_circle() -> None:
    """Lazy and type-only imports count; a package's own ``__init__`` may gather its modules."""
    arrows = {
        dotted(path): {name for name, _ in tools_imports(path)}
        for path in tools_modules()
        if path.name != "__init__.py"
    }
    circles = sorted(name for name in arrows if name in reachable(arrows, name))
    assert not circles


def reachable(arrows: dict[str, set[str]], start: str) -> set[str]:
    seen, waiting = set[str](), [start]
    while waiting:
        for name in arrows.get(waiting.pop(), set()) - seen:
            seen.add(name)
            waiting.append(name)
    return seen
