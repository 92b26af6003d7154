"""What the batcher needs of an engine: some caches, and one pass over tokens of several of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import numpy as np

from powerinfer_tools.generate.generation import TokenEngine
from powerinfer_tools.serving.jobs import Logits


class Wanted(Enum):
    """Which logits of a piece of work are of use."""

    NONE = 0
    LAST = 1
    ALL = 2


@dataclass(frozen=True)
class Work:
    """Tokens that follow what slot ``slot`` holds."""

    slot: int
    tokens: Sequence[int]
    wanted: Wanted


class Slots(Protocol):
    """A number of caches of equal length on one model. Not thread-safe."""

    @property
    def count(self) -> int:
        """How many there are."""
        ...

    @property
    def context(self) -> int:
        """Tokens that each can hold."""
        ...

    def step(self, work: Sequence[Work]) -> list[Logits]:
        """Process the tokens of different slots; for each the logits wanted (0, 1 or k rows, vocabulary),
        valid until the next call. The bits of each do not depend on the others."""
        ...

    def rewind(self, slot: int, position: int) -> int:
        """Forget what the slot holds from ``position`` on, or from an earlier one where it must; returns how
        many tokens it holds then."""
        ...

    def copy(self, source: int, target: int, count: int) -> int:
        """Make ``target`` hold the first ``count`` tokens of ``source``, or fewer where it must; returns how
        many."""
        ...


class SingleSlot:
    """The one cache of an engine."""

    count = 1

    def __init__(self, engine: TokenEngine) -> None:
        self._engine = engine

    @property
    def context(self) -> int:
        """Tokens that fit."""
        return self._engine.context

    def step(self, work: Sequence[Work]) -> list[Logits]:
        """Process one piece of work."""
        return [self._rows(piece) for piece in work]

    def _rows(self, work: Work) -> Logits:
        if work.wanted is Wanted.ALL:
            return np.stack([self._engine.prefill([token]).copy() for token in work.tokens])
        row = (
            self._engine.decode(work.tokens[0])
            if len(work.tokens) == 1
            else self._engine.prefill(work.tokens)
        )
        return row[None] if work.wanted is Wanted.LAST else row[None][:0]

    def rewind(self, slot: int, position: int) -> int:
        """Forget the cache from ``position`` on."""
        del slot
        self._engine.rewind(position)
        return position

    def copy(self, source: int, target: int, count: int) -> int:
        """There is nowhere to copy to."""
        del source, target, count
        raise AssertionError("an engine has one cache")
