"""Opening a model for the commands that run one."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from powerinfer_cli.console import progress, say
from powerinfer_cli.options import Placement

if TYPE_CHECKING:
    from powerinfer_tools.engine import Engine
    from powerinfer_tools.model.loading import Model
    from powerinfer_tools.progress import Progress


@contextmanager
def said(notices: Callable[[], Sequence[str]]) -> Iterator[None]:
    """Print the present notices, and at the end any new ones."""
    count = 0
    try:
        for notice in notices():
            say(notice)
            count += 1
        yield
    finally:
        for notice in notices()[count:]:
            say(notice)


@contextmanager
def opened_engine(
    path: Path,
    placement: Placement,
    *,
    threads: int | None,
    context: int | None,
) -> Iterator["Engine"]:
    """An engine on the model at ``path``, closed at the end."""
    with engines_of(path, placement, threads=threads, context=context) as (_, open_engine):
        engine = open_engine(mode=placement.engine_mode)
        count = len(engine.notices)
        try:
            yield engine
        finally:
            engine.close()
            for notice in engine.notices[count:]:
                say(notice)


@contextmanager
def engines_of(
    path: Path, placement: Placement, *, threads: int | None, context: int | None
) -> Iterator[tuple["Model", Callable[..., "Engine"]]]:
    """The model at ``path``, closed at the end, and what makes an engine on it in a ``mode``."""
    from powerinfer_tools.engine import Engine
    from powerinfer_tools.engine.from_disk import RamOptions
    from powerinfer_tools.model.loading import load_model

    def open_engine(**options: Any) -> "Engine":
        engine = Engine(
            model,
            threads=threads,
            context=context,
            device=placement.device,
            vram=placement.vram,
            kv_type=placement.kv_type,
            ram=RamOptions(placement.ram, placement.placing),
            progress=listener(placement.device),
            **options,
        )
        for notice in engine.notices:
            say(notice)
        return engine

    model = load_model(path)
    for notice in model.source.notices:
        say(notice)
    try:
        yield model, open_engine
    finally:
        model.close()


def listener(device: str) -> "Progress | None":
    """Who hears of GPU kernels that have to be compiled; None where there can be none."""
    return progress() if device == "cuda" else None


def measured_bandwidth(engine: "Engine") -> float:
    """This machine's read bandwidth in bytes per second, as the engine's threads reach it now."""
    return engine.read_bandwidth()


def read_text(path: Path) -> str:
    """Text of a file or of standard input (``-``); bytes that aren't UTF-8 become U+FFFD, which is said."""
    import sys

    data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        say(f"{path}: not UTF-8 at byte {error.start}; invalid bytes become U+FFFD")
        return data.decode("utf-8", "replace")
