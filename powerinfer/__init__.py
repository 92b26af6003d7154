"""Run a language model from Python.

    import powerinfer

    with powerinfer.load("model.gguf") as model:
        print(model.generate("The capital of France is", max_tokens=16).text)

The names in ``__all__`` are the public interface; everything else of this project may change.
"""

from powerinfer.conversation import Conversation
from powerinfer.errors import (
    ChatTemplateError,
    ContextFull,
    FormatError,
    HardwareError,
    ModelError,
    PowerInferError,
    SamplingError,
    TokenizerError,
)
from powerinfer.model import Model, load
from powerinfer.options import GenerateOptions, Message
from powerinfer.session import Session
from powerinfer.text_stream import Generated, TextStream
from powerinfer_tools.engine import EngineReport as Report

__all__ = [
    "ChatTemplateError",
    "ContextFull",
    "Conversation",
    "FormatError",
    "GenerateOptions",
    "Generated",
    "HardwareError",
    "Message",
    "Model",
    "ModelError",
    "PowerInferError",
    "Report",
    "SamplingError",
    "Session",
    "TextStream",
    "TokenizerError",
    "load",
]
