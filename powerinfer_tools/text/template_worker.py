"""The process that renders chat templates: started once, asked many times.

It forks for each request, so that the effects of a template (endless loops, full memory, a kill) end with
that one fork. A worker that has died is started anew. The process runs `template_child.py`.
"""

import contextlib
import os
import selectors
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

_CHILD = Path(__file__).with_name("template_child.py")
_LENGTH = struct.Struct("<Q")
_LONGEST = 1 << 32


class WorkerLost(Exception):
    """The worker ended or did not answer in time; `slow` says which."""

    def __init__(self, *, slow: bool) -> None:
        super().__init__("too slow" if slow else "lost")
        self.slow = slow


class TemplateWorker:
    """Takes one request at a time, from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """The process, once it exists."""
        return None if self._process is None else self._process.pid

    def render(self, request: bytes, seconds: float) -> bytes:
        """The child's answer to `request`. Raises WorkerLost, and OSError if no process can be started."""
        with self._lock:
            try:
                return self._ask(request, seconds)
            except WorkerLost as lost:
                self._stop()
                if lost.slow:
                    raise
            return self._ask(request, seconds)  # the process had died before, or was killed meanwhile

    def close(self) -> None:
        """End the process; the next request starts another."""
        with self._lock:
            self._stop()

    def _ask(self, request: bytes, seconds: float) -> bytes:
        process = self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        deadline = time.monotonic() + seconds
        try:
            process.stdin.write(_LENGTH.pack(len(request)) + request)
            process.stdin.flush()
        except OSError:
            raise WorkerLost(slow=False) from None
        (length,) = _LENGTH.unpack(_read(process.stdout.fileno(), _LENGTH.size, deadline))
        if length > _LONGEST:
            raise WorkerLost(slow=False)
        return _read(process.stdout.fileno(), length, deadline)

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            self._process = subprocess.Popen(  # noqa: S603  our own script, by its path
                [sys.executable, "-P", str(_CHILD)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C at the terminal is meant for this process
            )
        return self._process

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)  # including the processes that it forked
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


def _read(descriptor: int, count: int, deadline: float) -> bytes:
    data = bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while len(data) < count:
            if not selector.select(max(0.0, deadline - time.monotonic())):
                raise WorkerLost(slow=True)
            piece = os.read(descriptor, min(count - len(data), 1 << 20))
            if not piece:
                raise WorkerLost(slow=False)
            data += piece
    return bytes(data)


#: The worker that all templates of this process share.
WORKER = TemplateWorker()
