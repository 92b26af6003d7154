"""The served model as endpoints see it."""

import hashlib
import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from powerinfer_tools import __version__
from powerinfer_tools.text.chat import Template
from powerinfer_tools.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class ServedModel:
    """The model by its public name, with its tokenizer.

    ``identity`` names the weights, ``mode`` says how FFN layers are computed, and ``kv_type`` is the type of
    the cached values. Together these decide the bits of an answer.
    """

    name: str
    identity: str
    mode: str
    kv_type: str
    context: int
    tokenizer: Tokenizer
    template: Template
    template_source: str | None = None
    file: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    created: int = field(default_factory=lambda: int(time.time()))

    @cached_property
    def system_fingerprint(self) -> str:
        """A hash of model, mode, cache type and version. Servers with equal fingerprints give equal answers
        to equal requests with a seed."""
        parts = "\n".join((self.identity, self.mode, self.kv_type, __version__))
        return "fp_" + hashlib.sha256(parts.encode()).hexdigest()[:12]

    def card(self) -> dict[str, Any]:
        """The model's entry in a list of models."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "powerinfer",
            "meta": self.facts | {"n_ctx": self.context, "mode": self.mode},
        }
