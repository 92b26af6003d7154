"""Work of a device, and the pieces in which it can be repeated."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Work = Callable[[], None]


@dataclass(frozen=True)
class Launches:
    """Work in pieces. A piece that found no memory has done nothing, and can be repeated. The whole work
    cannot be repeated, since some pieces add to existing values."""

    pieces: Sequence[Work]

    def __call__(self) -> None:
        """All of it."""
        for piece in self.pieces:
            piece()


def pieces_of(work: Work) -> Sequence[Work]:
    """The pieces that can be repeated individually."""
    return work.pieces if isinstance(work, Launches) else (work,)
