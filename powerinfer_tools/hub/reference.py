"""Names of the hub's models: ``OWNER/NAME``, or with one of its files ``OWNER/NAME:QUANT``."""

import re
from dataclasses import dataclass

from powerinfer_tools.errors import HubError

_PREFIXES = ("https://huggingface.co/", "https://hf.co/", "huggingface.co/", "hf.co/", "hf://")
_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_REPOSITORY = re.compile(f"{_PART}/{_PART}")
_QUANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/ -]{0,200}")


@dataclass(frozen=True)
class Reference:
    """``repository``: OWNER/NAME; ``quant``: a label such as Q4_K_M, a file's name, or empty."""

    repository: str
    quant: str = ""

    @classmethod
    def parse(cls, text: str) -> "Reference":
        """``text`` as a reference. Raises HubError."""
        name = text.strip()
        for prefix in _PREFIXES:
            name = name.removeprefix(prefix)
        repository, colon, quant = name.rstrip("/").partition(":")
        doubled = "--" in repository or ".." in repository
        if not _REPOSITORY.fullmatch(repository) or doubled:
            raise HubError(
                f"{text[:200]!r} does not name a model of the hub: expected OWNER/NAME or OWNER/NAME:QUANT"
            )
        if (colon and not _QUANT.fullmatch(quant)) or ".." in quant:
            raise HubError(
                f"{quant[:200]!r} after {repository}: is not the label of a quantisation or a file's name"
            )
        return cls(repository, quant)

    @property
    def folder_name(self) -> str:
        """The folder of the model in the hub's cache."""
        return "models--" + self.repository.replace("/", "--")

    def __str__(self) -> str:
        return f"{self.repository}:{self.quant}" if self.quant else self.repository
