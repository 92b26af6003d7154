"""Which slot a request gets, and how much of its prompt a slot already holds.

An idle slot keeps its tokens until it is needed: the caches of idle slots are the prefix cache. A prompt
begins in the slot with the longest common start, or in another one with a copy of that start. Reuse is exact,
since the bits of a token do not depend on how the tokens before it were cut into passes; where they do, only
whole slices of prompts are reused.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from powerinfer_tools.serving.slots import Slots

#: A common start shorter than this is not worth a copy.
_WORTH_COPYING = 16


class Place:
    """One slot: its tokens, and whether a request is using it, or it is being saved. ``fixed_slice`` is the
    same as the slots'."""

    def __init__(self, slot: int, context: int, fixed_slice: int | None = None) -> None:
        self.slot = slot
        self.busy = self.saving = False
        self.last_use = 0
        self.length = 0
        self._slice = fixed_slice
        self._sliced = 0  # tokens at the start that were computed in whole slices
        self._tokens = np.zeros(context, np.int32)

    @property
    def tokens(self) -> npt.NDArray[np.int32]:
        """The tokens in the cache."""
        return self._tokens[: self.length]

    @property
    def reusable(self) -> npt.NDArray[np.int32]:
        """The tokens at the start that another request may reuse."""
        return self.tokens if self._slice is None else self._tokens[: self._sliced]

    def add(self, tokens: Sequence[int]) -> None:
        """Add tokens that have been processed in one pass."""
        self._tokens[self.length : self.length + len(tokens)] = tokens
        if self._sliced == self.length and len(tokens) == self._slice:
            self._sliced += len(tokens)
        self.length += len(tokens)

    def become(self, tokens: npt.NDArray[np.int32]) -> None:
        """The cache now holds these tokens, which were :attr:`reusable`."""
        self._tokens[: len(tokens)] = tokens
        self.length = self._sliced = len(tokens)

    def cut(self, length: int) -> None:
        """The cache holds at most the first ``length`` tokens."""
        self.length, self._sliced = length, min(self._sliced, length)

    def common(self, tokens: npt.NDArray[np.int32]) -> int:
        """How many tokens at the start are the same, and reusable."""
        held = self.reusable
        shortest = min(len(held), len(tokens))
        different = np.flatnonzero(held[:shortest] != tokens[:shortest])
        same = int(different[0]) if len(different) else shortest
        return same if self._slice is None else same // self._slice * self._slice


class Places:
    """All slots."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self._clock = 0
        self.all = [Place(slot, slots.context, slots.fixed_slice) for slot in range(slots.count)]

    @property
    def idle(self) -> list[Place]:
        """The places that nobody uses."""
        return [place for place in self.all if not place.busy and not place.saving]

    def take(self, prompt: Sequence[int], *, reuse: bool) -> tuple[Place, int]:
        """A slot for ``prompt``, and how many of its tokens it holds. There must be an idle slot."""
        tokens = np.asarray(prompt[:-1], np.int32)  # the last token has to be processed again for its logits
        idle = sorted(self.idle, key=lambda place: (place.length > 0, place.last_use))
        target, kept = idle[0], 0
        if reuse:
            target, kept = self._prefilled(idle, tokens)
        elif target.length:
            kept = self._cut(target, 0)
        target.busy = True
        self._clock += 1
        target.last_use = self._clock
        return target, kept

    def release(self, place: Place) -> None:
        """Free the place; its tokens stay."""
        place.busy = False

    def forget(self, place: Place) -> None:
        """The contents of the cache are no longer certain."""
        place.cut(self._slots.rewind(place.slot, 0))
        place.busy = False

    def _prefilled(self, idle: list[Place], tokens: npt.NDArray[np.int32]) -> tuple[Place, int]:
        donor = max(self.all, key=lambda place: (place.common(tokens), place in idle, place.last_use))
        common = donor.common(tokens)
        others = [place for place in idle if place is not donor]
        continues = common == donor.length or not others
        if donor in idle and common > 0 and continues:
            return donor, self._cut(donor, common)
        target = others[0] if others else idle[0]
        if target is donor or common < _WORTH_COPYING:
            return target, self._cut(target, target.common(tokens))
        self._cut(target, 0)  # in case the copy fails in the middle
        kept = self._slots.copy(donor.slot, target.slot, common)
        target.become(donor.tokens[:kept].copy())
        return target, kept

    def _cut(self, place: Place, length: int) -> int:
        place.cut(self._slots.rewind(place.slot, length))
        return place.length
