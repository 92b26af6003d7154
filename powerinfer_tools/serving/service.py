"""The objects shared by all endpoints: the model, the batcher, and the settings of the server."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from powerinfer_tools.serving.batcher import Batcher
from powerinfer_tools.serving.faults import internal, unavailable
from powerinfer_tools.serving.served_model import ServedModel

MIB = 1 << 20


@dataclass(frozen=True)
class Settings:
    """How the server speaks to clients. Without ``keys`` everybody may send requests; ``origins`` are the web
    pages of other hosts that may."""

    keys: frozenset[str] = frozenset()
    origins: tuple[str, ...] = ()
    body_bytes: int = 4 * MIB
    body_seconds: float = 30.0
    page: bool = True


@dataclass
class Service:
    """``model`` and ``batcher`` are None while the model is loading; ``failure`` says why it cannot be
    loaded."""

    settings: Settings
    log: Callable[[dict[str, Any]], None]
    model: ServedModel | None = None
    batcher: Batcher | None = None
    report: Callable[[], dict[str, Any]] = dict
    draining: bool = False
    started: float = field(default_factory=time.time)

    def ready(self) -> tuple[ServedModel, Batcher]:
        """The model and the batcher. Raises RequestFault (503), which says why they are not ready."""
        if self.draining:
            raise unavailable("the server is shutting down", 5)
        if self.model is None or self.batcher is None:
            raise unavailable("loading model")
        if not self.batcher.alive:
            raise internal("the engine has stopped")
        return self.model, self.batcher

    async def reported(self) -> dict[str, Any]:
        """The engine's report, made between two passes, since it may have to ask the hot device. Raises
        RequestFault as :meth:`ready` does."""
        _, batcher = self.ready()
        return await batcher.between_passes(self.report)
