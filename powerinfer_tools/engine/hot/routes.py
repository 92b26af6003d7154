"""A router's choice in the form that both sides use. This module imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass

#: The number of the shared expert, which every token takes.
SHARED = -1


@dataclass(frozen=True)
class Route:
    """The tokens (rows of a batch, ascending) that take one expert, and its weight in each."""

    expert: int
    tokens: Sequence[int]
    weights: Sequence[float]
