"""Work of a device, and in which pieces it can be done again."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Work = Callable[[], None]


@dataclass(frozen=True)
class Launches:
    """Work in pieces. One that found no memory has done nothing, and can be done again; all of them cannot,
    since some add to what is there."""

    pieces: Sequence[Work]

    def __call__(self) -> None:
        """All of it."""
        for piece in self.pieces:
            piece()


def pieces_of(work: Work) -> Sequence[Work]:
    """What can be done again by itself."""
    return work.pieces if isinstance(work, Launches) else (work,)
