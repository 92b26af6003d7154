"""The JSON document inside a profile: everything that is not an array."""

from __future__ import annotations

from dataclasses import dataclass

#: The ``activation`` of a profile whose neurons are experts, active where a token takes them.
ROUTING = "routing"


@dataclass(frozen=True)
class Corpus:
    """One file of the corpus: ``sha256`` and size of all of it, ``tokens`` of what was counted."""

    name: str
    sha256: str
    tokens: int
    bytes: int


@dataclass(frozen=True)
class CorpusPosition:
    """How far an unfinished profile has come.

    ``work`` is a SHA-256 of the command's corpus and options, so that only the same command takes it up
    again; ``windows`` whole windows of it have been counted.
    """

    work: str
    windows: int


@dataclass(frozen=True)
class ProfileDocument:
    """The fields of ``Profile`` that are not arrays, and the number of neurons of each layer.

    ``expert_neurons``: neurons of each expert whose neurons were counted, by layer; 0 for a layer without
    such experts, empty where no layer has any.
    """

    fingerprint: str
    model_name: str
    architecture: str
    activation: str
    exact_zeros: bool
    tokens: int
    window: int
    target_density: float
    corpus: tuple[Corpus, ...]
    tool_version: str
    neurons: tuple[int, ...]
    checkpoint: CorpusPosition | None
    expert_neurons: tuple[int, ...] = ()


def corpus_key(entry: Corpus) -> tuple[str, str]:
    """The key by which corpora are sorted."""
    return entry.name, entry.sha256
