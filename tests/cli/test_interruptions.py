"""A kill, a full disk, Ctrl-C: nothing half-written under a final name, and a clear end."""

import resource
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from processes import Command, command_line, environment
from tiny_models import CASES, make_tiny_model

TEXT = "The river was wide and slow, and the boats went down it with the evening. " * 400


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, smollm2: Path, powerinfer: Command) -> Path:
    """A folder with the model, its profile and a plan."""
    folder = tmp_path_factory.mktemp("interruptions")
    (folder / "model.gguf").symlink_to(smollm2)
    (folder / "text.txt").write_text(TEXT)
    for words in (
        "profile -m model.gguf --corpus text.txt --tokens 512",
        "plan -m model.gguf --vram 72MiB --hardware pc-low --ctx 512",
    ):
        ended = powerinfer(*words.split(), cwd=folder)
        assert ended.code == 0, ended.err
    return folder


def start(folder: Path, *arguments: str, limit: Callable[[], None] | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command_line(*arguments),
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=limit,
    )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> bool:
    """Until ``condition`` holds; False if the process ended before."""
    while process.poll() is None:
        if condition():
            return True
        time.sleep(0.002)
    return False


def test_a_kill_in_the_middle_of_convert_leaves_no_split_file(folder: Path, powerinfer: Command) -> None:
    output = folder / "killed.powerinfer.gguf"
    process = start(folder, "convert", "-m", "model.gguf", "-o", output.name)
    try:
        before = set(folder.iterdir())

        def is_writing() -> bool:
            return any(entry.stat().st_size for entry in set(folder.iterdir()) - before if entry.exists())

        assert wait_for(is_writing, process), "convert ended before it could be killed"
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.communicate()
    assert not output.exists()
    ended = powerinfer("convert", "-m", "model.gguf", "-o", output.name, cwd=folder)
    assert ended.code == 0, ended.err
    assert output.is_file()
    assert {entry.name for entry in folder.iterdir()} == {entry.name for entry in before} | {output.name}


def test_a_disk_that_fills_up_is_one_line_and_leaves_nothing(folder: Path) -> None:
    """A limit on the size of files stands in for the full disk: both are an OSError out of a write."""
    before = {entry.name for entry in folder.iterdir()}
    limit = 1 << 20
    process = start(
        folder,
        *("convert", "-m", "model.gguf", "-o", "full.powerinfer.gguf"),
        limit=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    out, err = process.communicate(timeout=120)
    lines = [line for line in err.splitlines() if line.startswith("powerinfer: ")]
    assert process.returncode == 1
    assert out == ""
    assert "Traceback" not in err
    assert len(lines) == 1
    assert "full.powerinfer.gguf" in lines[0]
    assert {entry.name for entry in folder.iterdir()} == before


def test_a_disk_that_fills_up_under_learn(tmp_path: Path) -> None:
    """The text is there, and what it took of the experts is not written in part."""
    make_tiny_model(tmp_path, CASES["qwen3moe"], "moe")
    words = ("run", "--raw", "-m", "moe.gguf", "-p", "the", "-n", "4", "--temp", "0", "-t", "1")
    process = start(
        tmp_path,
        *(*words, "--learn", "learnt.safetensors"),
        limit=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512)),
    )
    _, err = process.communicate(timeout=120)
    lines = [line for line in err.splitlines() if line.startswith("powerinfer: ")]
    assert process.returncode == 1
    assert "Traceback" not in err
    assert len(lines) == 1
    assert "learnt.safetensors" in lines[0]
    assert {entry.name for entry in tmp_path.iterdir()} == {"moe.gguf"}


def test_ctrl_c_in_profile_is_130_and_the_same_command_goes_on(folder: Path, powerinfer: Command) -> None:
    words = ["profile", "-m", "model.gguf", "--corpus", "text.txt", "--ctx", "64", "--tokens", "4096", "-o"]
    process = start(folder, *words, "interrupted.st")
    try:
        time.sleep(1.5)  # wherever it is by then: loading, counting, or between two windows
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert out == ""
    assert "Traceback" not in err
    assert not (folder / "interrupted.st").exists()
    for name in ("interrupted.st", "straight.st"):
        ended = powerinfer(*words, name, cwd=folder)
        assert ended.code == 0, ended.err
    assert (folder / "interrupted.st").read_bytes() == (folder / "straight.st").read_bytes()


def test_ctrl_c_in_run_is_130_with_the_summary(folder: Path) -> None:
    words = [
        "run",
        "-v",
        "-m",
        "model.gguf",
        "-p",
        "Once upon a time",
        "-n",
        "100000",
        "-c",
        "8192",
        "--ignore-eos",
    ]
    process = start(folder, *words)
    assert process.stdout is not None
    assert process.stdout.read(5)  # the answer has begun
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "ended: interrupted" in err
    assert "decode:" in err


def test_a_reader_that_goes_away_is_no_traceback(folder: Path) -> None:
    process = start(
        folder, "run", "-m", "model.gguf", "-p", "Once upon a time", "-n", "200", "--ignore-eos", "-v"
    )
    assert process.stdout is not None
    assert process.stdout.read(1)
    process.stdout.close()
    assert process.stderr is not None
    err = process.stderr.read()
    process.wait(timeout=60)
    assert "Traceback" not in err
    assert process.returncode != 0
