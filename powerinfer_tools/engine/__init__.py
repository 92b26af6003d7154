"""The engine: runs a model token by token, on the CPU alone or together with a hot device."""

from powerinfer_tools.engine.engine import Engine
from powerinfer_tools.engine.report import EngineReport
from powerinfer_tools.engine.session import Session
from powerinfer_tools.engine.weights import Part, Weights

__all__ = ["Engine", "EngineReport", "Part", "Session", "Weights"]
