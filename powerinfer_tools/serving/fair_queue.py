"""Requests that wait, one client after another."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from powerinfer_tools.serving.faults import overloaded, too_many


class Waiting(Protocol):
    """The interface of a queue's entries."""

    @property
    def client(self) -> str:
        """The client that the entry comes from."""
        ...


Entry = TypeVar("Entry", bound=Waiting)


@dataclass(frozen=True)
class QueueLimits:
    """How many requests may wait: in all, and per client."""

    waiting: int = 256
    per_client: int = 64


class FairQueue(Generic[Entry]):
    """First come, first served within a client; clients take turns. Not thread-safe."""

    def __init__(self, limits: QueueLimits) -> None:
        self._limits = limits
        self._of: dict[str, deque[Entry]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def require_room(self, client: str, count: int, retry_after: int) -> None:
        """Raise RequestFault (429 or 503) if ``count`` more requests of ``client`` may not wait."""
        if self._count + count > self._limits.waiting:
            raise overloaded(f"{self._count} requests are waiting, more than fit", retry_after)
        if len(self._of.get(client, ())) + count > self._limits.per_client:
            raise too_many(
                f"{len(self._of.get(client, ()))} requests of this client are waiting, the limit is "
                f"{self._limits.per_client}",
                retry_after,
            )

    def push(self, entry: Entry) -> None:
        """Add ``entry`` to the queue."""
        self._of.setdefault(entry.client, deque()).append(entry)
        self._count += 1

    def pop(self, ready: Callable[[Entry], bool]) -> Entry | None:
        """The next entry that is ``ready``; its client goes to the end of the round."""
        for client in list(self._of):
            entries = self._of[client]
            chosen = next((entry for entry in entries if ready(entry)), None)
            if chosen is not None:
                self.remove(chosen)
                if client in self._of:
                    self._of[client] = self._of.pop(client)
                return chosen
        return None

    def remove(self, entry: Entry) -> bool:
        """Remove ``entry``; returns whether it was waiting."""
        entries = self._of.get(entry.client)
        if entries is None or entry not in entries:
            return False
        entries.remove(entry)
        self._count -= 1
        if not entries:
            del self._of[entry.client]
        return True

    def clear(self) -> list[Entry]:
        """Remove and return all entries."""
        entries = [entry for waiting in self._of.values() for entry in waiting]
        self._of.clear()
        self._count = 0
        return entries
