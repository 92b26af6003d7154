"""Text in and out of a model: tokeniser, streaming detokeniser and chat template, all from GGUF metadata."""

from powerinfer_tools.text.pieces import StreamDecoder
from powerinfer_tools.text.tokenizer import Tokenizer

__all__ = ["StreamDecoder", "Tokenizer"]
