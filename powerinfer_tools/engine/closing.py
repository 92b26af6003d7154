"""What has to be closed, as a context manager."""

from abc import ABC, abstractmethod
from typing import Self


class Closing(ABC):
    """Closes itself where a ``with`` statement ends."""

    @abstractmethod
    def close(self) -> None:
        """Give back what is held."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
