"""The engine: runs a model token by token, on the CPU alone or together with a hot device."""

from powerinfer_tools.engine.engine import Engine
from powerinfer_tools.engine.report import EngineReport

__all__ = ["Engine", "EngineReport"]
