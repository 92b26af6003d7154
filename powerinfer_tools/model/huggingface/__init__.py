"""Hugging Face directories (config.json, safetensors, a tokeniser's files) read as GGUF files are."""

from powerinfer_tools.model.huggingface.folder import ModelFolder

__all__ = ["ModelFolder"]
