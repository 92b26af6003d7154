"""Opening a model for the commands that run one."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from powerinfer_cli.options import Placement

if TYPE_CHECKING:
    from powerinfer_tools.engine import Engine


@contextmanager
def opened_engine(
    path: Path, placement: Placement, *, threads: int | None, context: int | None
) -> Iterator["Engine"]:
    """An engine on the model at ``path``, closed at the end."""
    from powerinfer_tools.engine import Engine
    from powerinfer_tools.model import load_model

    model = load_model(path)
    try:
        engine = Engine(
            model,
            threads=threads,
            context=context,
            mode=placement.engine_mode,
            device=placement.device,
            vram=placement.vram,
            kv_type=placement.kv_type,
        )
        try:
            yield engine
        finally:
            engine.close()
    finally:
        model.close()


def measured_bandwidth(engine: "Engine") -> float:
    """This machine's read bandwidth in bytes per second, as the engine's threads reach it now."""
    return engine.read_bandwidth()


def read_text(path: Path) -> str:
    """Text of a file or of standard input (``-``); bytes that aren't UTF-8 become U+FFFD, which is said."""
    import sys

    from powerinfer_cli.console import say

    data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        say(f"{path}: not UTF-8 at byte {error.start}; what cannot be read becomes U+FFFD")
        return data.decode("utf-8", "replace")
