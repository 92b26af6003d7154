"""Opening a model, whatever holds it."""

from pathlib import Path

from powerinfer_formats.gguf_layout import MAGIC, ORIGINAL_MAGIC
from powerinfer_formats.gguf_shards import open_gguf
from powerinfer_formats.model_source import ModelSource


def open_source(path: str | Path) -> ModelSource:
    """The model at ``path``: a GGUF file, any shard of one, a file of the original PowerInfer, or a Hugging
    Face directory.

    Raises FormatError for what is not well-formed, ModelError or TokenizerError for what is not supported.
    """
    if Path(path).is_dir():
        from powerinfer_tools.model.huggingface import ModelFolder

        return ModelFolder.open(path)
    return open_gguf(path, magics=(MAGIC, ORIGINAL_MAGIC))
