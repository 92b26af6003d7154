"""The batcher's interface to an engine: a number of caches, and one pass over tokens of several of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from powerinfer_tools.serving.jobs import Logits


class Wanted(Enum):
    """Which logits of a piece of work are wanted."""

    NONE = 0
    LAST = 1
    ALL = 2


@dataclass(frozen=True)
class Work:
    """Tokens that follow the tokens in slot ``slot``."""

    slot: int
    tokens: Sequence[int]
    logits: Wanted


class Slots(Protocol):
    """A number of caches of equal length on one model. Not thread-safe."""

    @property
    def count(self) -> int:
        """The number of slots."""
        ...

    @property
    def context(self) -> int:
        """Tokens that each slot can hold."""
        ...

    @property
    def fixed_slice(self) -> int | None:
        """The length of every piece of a prompt but the last, counted from its start, where bits depend on
        how a prompt is cut into passes. Another request's tokens are then reused only in whole pieces."""
        ...

    def step(self, work: Sequence[Work]) -> list[Logits]:
        """Process the tokens of different slots. Returns for each the logits it wants (0, 1 or k rows,
        vocabulary), valid until the next call. The bits of each do not depend on the others."""
        ...

    def write(self, slots: Sequence[int], tokens: Sequence[int]) -> Logits:
        """The result of :meth:`step` for one token of each of different slots, in few instructions: logits
        (slots, vocabulary), each to be checked before use. Only if ``fixed_slice`` is None."""
        ...

    def check(self, logits: Logits) -> None:
        """Raise ModelError unless all are finite."""
        ...

    def rewind(self, slot: int, position: int) -> int:
        """Forget the slot's tokens from ``position`` on, or from an earlier position if it must. Returns how
        many tokens remain."""
        ...

    def copy(self, source: int, target: int, count: int) -> int:
        """Make ``target`` hold the first ``count`` tokens of ``source``, or fewer if it must. Returns how
        many it holds."""
        ...


class BlockSlots(Protocol):
    """Slots whose contents can be taken out and put back: blocks of tokens and, where a recurrence has state
    beyond tokens, a checkpoint of it. Other slots may be computed meanwhile."""

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
        """The slot's contents for ``count`` tokens from ``first`` on."""
        ...

    def checkpoint(self, slot: int) -> bytes:
        """The state of the slot's recurrences after its last token."""
        ...

    def restore(self, slot: int, first: int, count: int, data: bytes) -> None:
        """Write a block to its place in the slot; it takes effect with :meth:`hold`."""
        ...

    def hold(self, slot: int, count: int, checkpoint: bytes | None) -> None:
        """Declare the first ``count`` tokens restored, with the checkpoint after them; None if the model has
        no checkpoints."""
        ...
