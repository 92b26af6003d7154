"""Which slot a request gets, and how much of its prompt a slot holds already.

A slot that is left keeps its tokens until it is needed: the caches of idle slots are the prefix cache. A
prompt begins in the slot with the longest common start, or in another one with a copy of that start. Reuse is
exact, since the bits of a token do not depend on how the tokens before it were cut into passes.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from powerinfer_tools.serving.slots import Slots

#: A common start shorter than this is not worth a copy.
_WORTH_COPYING = 16


class Place:
    """One slot: the tokens it holds, and whether a request is using it, or it is being saved."""

    def __init__(self, slot: int, context: int) -> None:
        self.slot = slot
        self.busy = self.saving = False
        self.last_use = 0
        self.length = 0
        self._tokens = np.zeros(context, np.int32)

    @property
    def tokens(self) -> npt.NDArray[np.int32]:
        """The tokens in the cache."""
        return self._tokens[: self.length]

    def add(self, tokens: Sequence[int]) -> None:
        """These have been processed."""
        self._tokens[self.length : self.length + len(tokens)] = tokens
        self.length += len(tokens)

    def become(self, tokens: npt.NDArray[np.int32]) -> None:
        """The cache holds these now."""
        self._tokens[: len(tokens)] = tokens
        self.length = len(tokens)

    def common(self, tokens: npt.NDArray[np.int32]) -> int:
        """How many tokens at the start are the same."""
        shortest = min(self.length, len(tokens))
        different = np.flatnonzero(self._tokens[:shortest] != tokens[:shortest])
        return int(different[0]) if len(different) else shortest


class Places:
    """All slots."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self._clock = 0
        self.all = [Place(slot, slots.context) for slot in range(slots.count)]

    @property
    def idle(self) -> list[Place]:
        """Those that nobody uses."""
        return [place for place in self.all if not place.busy and not place.saving]

    def take(self, prompt: Sequence[int], *, reuse: bool) -> tuple[Place, int]:
        """A slot for ``prompt``, and how many of its tokens are in it. There must be an idle one."""
        tokens = np.asarray(prompt[:-1], np.int32)  # the last one is needed anew for its logits
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
        """Nobody uses it any more; its tokens stay."""
        place.busy = False

    def forget(self, place: Place) -> None:
        """What the cache holds is not certain any more."""
        self._slots.rewind(place.slot, 0)
        place.length = 0
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
        self._cut(target, 0)  # should the copy fail in the middle
        kept = self._slots.copy(donor.slot, target.slot, common)
        target.become(donor.tokens[:kept].copy())
        return target, kept

    def _cut(self, place: Place, length: int) -> int:
        place.length = self._slots.rewind(place.slot, length)
        return place.length
