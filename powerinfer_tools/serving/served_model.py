"""What endpoints know of the model that is served."""

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
    """The model by its public name, with what turns text into tokens and back.

    ``identity`` names the weights, ``mode`` how FFN layers are computed, ``kv_type`` what caches hold: all
    that decides the bits of an answer.
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
        """Equal where equal requests with a seed get equal answers: model, mode, cache type and version."""
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
