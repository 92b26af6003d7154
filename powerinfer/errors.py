"""The errors. Every error of the engine is a :class:`PowerInferError`; a damaged or unreadable file raises a
:class:`FormatError`."""

from powerinfer_formats.errors import FormatError
from powerinfer_tools.errors import (
    ChatTemplateError,
    ContextFull,
    HardwareError,
    ModelError,
    PowerInferError,
    SamplingError,
    TokenizerError,
)

__all__ = [
    "ChatTemplateError",
    "ContextFull",
    "FormatError",
    "HardwareError",
    "ModelError",
    "PowerInferError",
    "SamplingError",
    "TokenizerError",
]
