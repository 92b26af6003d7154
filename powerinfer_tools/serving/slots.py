"""What the batcher needs of an engine: some caches, and one pass over tokens of several of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

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
    logits: Wanted


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

    @property
    def fixed_slice(self) -> int | None:
        """Where bits depend on how a prompt is cut into passes: the length of every piece but the last,
        counted from the start. What another request left can be used in such pieces alone."""
        ...

    def step(self, work: Sequence[Work]) -> list[Logits]:
        """Process the tokens of different slots; for each the logits wanted (0, 1 or k rows, vocabulary),
        valid until the next call. The bits of each do not depend on the others."""
        ...

    def write(self, slots: Sequence[int], tokens: Sequence[int]) -> Logits:
        """What :meth:`step` gives for one token of each of different slots, in few instructions; logits
        (slots, vocabulary), each to be checked before it is used. Where ``fixed_slice`` is None."""
        ...

    def check(self, logits: Logits) -> None:
        """Raise ModelError unless all are finite."""
        ...

    def rewind(self, slot: int, position: int) -> int:
        """Forget what the slot holds from ``position`` on, or from an earlier one where it must; returns how
        many tokens it holds then."""
        ...

    def copy(self, source: int, target: int, count: int) -> int:
        """Make ``target`` hold the first ``count`` tokens of ``source``, or fewer where it must; returns how
        many."""
        ...


class BlockSlots(Protocol):
    """Slots whose contents can be taken out and put back: blocks of tokens, and where a recurrence keeps more
    than tokens, a checkpoint of it. Other slots may be computed meanwhile."""

    @property
    def fixed_slice(self) -> int | None:
        """See :class:`Slots`."""
        ...

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of a checkpoint; 0 where blocks suffice."""
        ...

    def block_bytes(self, count: int) -> int:
        """Bytes of ``count`` tokens, a multiple of 16."""
        ...

    def block(self, slot: int, first: int, count: int) -> bytes:
        """What the slot holds of ``count`` tokens from ``first`` on."""
        ...

    def checkpoint(self, slot: int) -> bytes:
        """What recurrences of the slot hold after its last token."""
        ...

    def restore(self, slot: int, first: int, count: int, data: bytes) -> None:
        """Put a block where it belongs; :meth:`hold` makes it count."""
        ...

    def hold(self, slot: int, count: int, checkpoint: bytes | None) -> None:
        """The first ``count`` tokens have been restored, and this is the checkpoint after them; None where
        there are none."""
        ...
