"""Whatever goes wrong: one clear line, the right exit code, no traceback."""

import errno
import os
import subprocess

import pytest
import typer

from powerinfer_cli.boundary import boundary
from powerinfer_formats.errors import FormatError
from powerinfer_kernels import KernelError
from powerinfer_tools.errors import PlanError
from processes import command_line, environment


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (PlanError("the budget is too small"), "powerinfer: the budget is too small"),
        (FormatError("x.gguf", "has a bad magic"), "powerinfer: x.gguf: has a bad magic"),
        (KernelError("no such variant"), "powerinfer: no such variant"),
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out.gguf"),
            "powerinfer: out.gguf: No space left on device",
        ),
        (OSError(errno.EACCES, os.strerror(errno.EACCES), "m.gguf"), "powerinfer: m.gguf: Permission denied"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "powerinfer: No space left on device"),
        (MemoryError(), "powerinfer: out of memory"),
        (
            ZeroDivisionError("division by zero"),
            "powerinfer: internal error: ZeroDivisionError: division by zero "
            "(run again with --debug for details, and please report it)",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_failures_are_one_line(error: Exception, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as ended, boundary(debug=False):
        raise error
    assert ended.value.exit_code == 1
    assert capsys.readouterr() == ("", line + "\n")


def test_debug_shows_the_traceback_and_the_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit), boundary(debug=True):
        raise PlanError("too small")
    error = capsys.readouterr().err
    assert error.startswith("Traceback")
    assert error.endswith("powerinfer: too small\n")


def test_interrupt_is_130(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as ended, boundary(debug=False):
        raise KeyboardInterrupt
    assert ended.value.exit_code == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_message_stays_on_one_line_and_harmless(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit), boundary(debug=False):
        raise FormatError("x.gguf", "has tensor 'a\n\x1b[31mb' twice")
    assert capsys.readouterr().err == "powerinfer: x.gguf: has tensor 'a  [31mb' twice\n"


def test_a_message_is_not_endless(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit), boundary(debug=False):
        raise FormatError("x.gguf", f"has a tensor {'n' * 900_000!r} twice")
    line = capsys.readouterr().err
    assert len(line) < 1100
    assert line.startswith("powerinfer: x.gguf: has a tensor")
    assert line.endswith("twice\n")


def test_nobody_reads_the_output() -> None:
    """Whether the reader goes away or there never was one: a quiet end with what a shell says of SIGPIPE."""
    for shell in ('"$@" >&-', 'set -o pipefail; "$@" | true'):
        done = subprocess.run(
            ["/bin/bash", "-c", shell, "bash", *command_line("plan", "--list")],
            capture_output=True,
            env=environment(),
            check=False,
        )
        assert (done.returncode, done.stderr) in ((141, b""), (0, b"")), shell
        if shell.endswith(">&-"):
            assert done.returncode == 141
