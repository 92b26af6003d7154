"""Promises of the project's own files."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
IMPORT_NAMES = {"powerinfer_cli", "powerinfer_tools", "powerinfer_formats", "powerinfer_kernels"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    lines = (ROOT / "requirements/dev.txt").read_text(encoding="utf-8").splitlines()
    stated = [line.split("#")[0].strip() for line in lines]
    pairs = [line.split("==") for line in stated if line]
    assert all(len(pair) == 2 for pair in pairs), "every line of requirements/dev.txt pins one exact version"
    return {normalised(name): version for name, version in pairs}


def test_what_the_package_needs_is_pinned_for_development() -> None:
    extras = [line for lines in PROJECT["project"]["optional-dependencies"].values() for line in lines]
    needed = [re.split(r"[<>=!~ \[]", line)[0] for line in PROJECT["project"]["dependencies"] + extras]
    assert not {normalised(name) for name in needed} - set(pins())


def test_torch_is_the_version_that_the_project_agreed_on() -> None:
    assert pins()["torch"] == "2.13.0"


def test_version_is_said_once() -> None:
    import powerinfer_tools

    assert powerinfer_tools.__version__ == PROJECT["project"]["version"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built without network from a copy of nothing but what the build reads."""
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
def empty_environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel alone; its site-packages folder."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(folder / "bin/python")]
    command = [*pip, "install", "--no-index", "--no-deps", "--quiet", str(wheel)]
    subprocess.run(command, capture_output=True, text=True, check=True)
    return next(folder.glob("lib/python3.*/site-packages"))


def test_wheel_is_for_the_stable_abi(wheel: Path) -> None:
    assert "-cp311-abi3-" in wheel.name


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
    """The installed wheel and its dependencies, without any sources, answer and run the extension."""
    scripts = empty_environment.parents[2] / "bin"
    # The dependencies come from the environment that runs the tests. powerinfer may be installed there, too:
    # the wheel's own folder goes first.
    dependencies = [path for path in sys.path if path.endswith("-packages")]
    environment = {
        "PATH": os.environ["PATH"],
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
