"""The progress of compiling kernels at a first start.

Triton compiles a kernel when it is first launched, for the row types and widths in use, and keeps the result
on disk. A rehearsal finds the number of kernels beforehand: it runs all the work, except kernels that do not
exist yet. Kernels that are only loaded from disk are not reported.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from powerinfer_tools.progress import Progress


class Rehearsing(Protocol):
    """A device on which work can be tried and its results dropped."""

    def rehearsal(self) -> AbstractContextManager[None]:
        """Within it, what is recorded or prepared is run once, and nothing is kept."""


class Compilation:
    """Tells ``progress`` of the kernels of one start."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._total = self._done = self._compiled = 0
        self._began: float | None = None

    def count(self, device: Rehearsing, work: Callable[[], object]) -> None:
        """Count the kernels that ``work`` needs and that this process does not have yet."""
        from triton import knobs

        missing = set[tuple[object, ...]]()

        def skip(*, key: object, fn: Any, **_: object) -> bool:
            missing.add((fn.module, fn.name, str(key)))
            return True  # neither compiled nor launched

        before, knobs.runtime.jit_cache_hook = knobs.runtime.jit_cache_hook, skip
        try:
            with device.rehearsal():
                work()
        finally:
            knobs.runtime.jit_cache_hook = before
        self._total = self._done + len(missing)

    @contextmanager
    def told(self) -> Iterator[None]:
        """Listen to the compiler meanwhile, where there is one."""
        try:
            from triton import knobs
        except Exception:  # noqa: BLE001 - versions too old or too new fail in ways of their own
            yield
            return
        before, knobs.compilation.listener = knobs.compilation.listener, self._heard
        try:
            yield
        finally:
            knobs.compilation.listener = before
            self._end(knobs.cache.dir)

    def _heard(self, *, cache_hit: bool, **_: object) -> None:
        """A kernel is there: compiled, or loaded from disk."""
        self._done += 1
        if not cache_hit:
            self._compiled += 1
            if self._began is None:
                self._began = time.perf_counter()
                text = "compiling GPU kernels, once for this model and GPU"
                self._progress.start(text, max(self._total, self._done) or None, "kernels")
                self._progress.advance(self._done - 1)
        if self._began is not None:
            self._progress.advance(1)

    def _end(self, folder: str) -> None:
        if self._began is None:
            return
        seconds = time.perf_counter() - self._began
        self._progress.finish()
        said = f"{self._compiled} GPU kernels compiled in {seconds:.1f} s"
        self._progress.note(f"{said}; the next start takes them from {folder}")
