"""Opening a model, whatever holds it."""

from pathlib import Path

from powerinfer_formats.gguf_reader import GGUFFile
from powerinfer_formats.model_source import ModelSource


def open_source(path: str | Path) -> ModelSource:
    """The model at ``path``: a GGUF file. Raises ``FormatError``."""
    return GGUFFile.open(path)
