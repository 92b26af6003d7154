"""The boundary around every command: an error is one clear line and an exit code, never a traceback.

Exit codes: 0 done, 1 the work failed, 2 the command line was wrong (typer's own), 130 interrupted, 141 nobody
reads standard output. A mapped file that another program shortens is 1, too, with a line that names it.
"""

import errno
import functools
import io
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import typer

from powerinfer_cli.console import say
from powerinfer_formats.mapped_file import before_mapping
from powerinfer_tools.errors import PowerInferError

FAILED = 1
INTERRUPTED = 130
#: What a shell reports of a program that SIGPIPE ended: the reader of standard output went away.
OUTPUT_CLOSED = 128 + 13
#: Names and texts from files may be of any length; a message of more characters is cut in the middle.
LONGEST_MESSAGE = 1000


def guarded(command: Callable[..., Any]) -> Callable[..., Any]:
    """``command`` behind the boundary; ``debug=True`` among its arguments shows tracebacks."""

    @functools.wraps(command)
    def call(**values: Any) -> Any:
        if _guard_mapped_files not in before_mapping:
            before_mapping.append(_guard_mapped_files)
        with boundary(debug=bool(values.get("debug"))):
            return command(**values)

    return call


def _guard_mapped_files() -> None:
    """Let a mapped file that becomes shorter end the process with a line that names it."""
    from powerinfer_tools.interrupts import guard_mapped_files

    guard_mapped_files(FAILED)


@contextmanager
def boundary(*, debug: bool) -> Iterator[None]:
    """Turn what goes wrong inside into one line and :class:`typer.Exit`."""
    try:
        yield
    except (typer.Exit, typer.Abort, typer.TyperException, typer.BadParameter):
        raise
    except BrokenPipeError:
        raise typer.Exit(_discard_output()) from None  # the reader went away (`| head`): the end, quietly
    except KeyboardInterrupt:
        say("interrupted")
        raise typer.Exit(INTERRUPTED) from None
    except Exception as error:  # noqa: BLE001  # this is the boundary: whatever it is, the user gets one line
        if debug:
            traceback.print_exc(file=sys.stderr)
        say(f"powerinfer: {describe(error)}")
        raise typer.Exit(FAILED) from None


def end_after_loss(code: object) -> None:
    """End the process here with ``code`` where it lost a device: the driver refuses destructors, and an
    exception in one would abort."""
    loss = sys.modules.get("powerinfer_tools.engine.hot.loss")
    if loss is None or not loss.was_lost():
        return
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code if isinstance(code, int) else FAILED if code else 0)


class NoOutput(io.TextIOBase):
    """Standard output of a process that was started without one: as a pipe that nobody reads."""

    encoding = "utf-8"

    def write(self, text: str) -> int:
        """Raises BrokenPipeError, but for nothing."""
        if text:
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
        return 0


def _discard_output() -> int:
    """Let nothing that is still to be written fail again while Python ends."""
    sys.stdout = io.StringIO()
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return OUTPUT_CLOSED


def describe(error: Exception) -> str:
    """One line on what went wrong, for a person; not endless, whatever a file's names are."""
    text = _described(error)
    half = LONGEST_MESSAGE // 2
    return text if len(text) <= LONGEST_MESSAGE else f"{text[:half]} … {text[-half:]}"


def _described(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename is not None else ""
        return f"{where}{error.strerror}"
    if isinstance(error, MemoryError):
        return "out of memory" + (f": {error}" if str(error) else "")
    if is_expected(error):
        return str(error)
    kind = type(error).__name__
    return f"internal error: {kind}: {error} (run again with --debug for details, and please report it)"


def is_expected(error: Exception) -> bool:
    """Whether it is the world's fault or the user's, and not this program's."""
    if isinstance(error, PowerInferError | OSError | MemoryError):
        return True
    # By name, since importing the packages of these two costs numpy.
    classes = {f"{cls.__module__.split('.')[0]}.{cls.__name__}" for cls in type(error).__mro__}
    return bool(classes & {"powerinfer_formats.FormatError", "powerinfer_kernels.KernelError"})
