"""What an engine tells about weights that are read from disk."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class DiskReport:
    """What happened to units that are read from disk (``what``: experts, or FFNs): ``taken`` by passes, of
    which ``hits`` were in memory and ``late`` on their way; ``ahead`` were read before their router had
    chosen, of which ``ahead_used`` were then taken; ``read_bytes`` came from disk, ``memory_bytes`` from
    memory; ``moved`` made room for others. The program waited for ``wait_seconds``."""

    what: str
    taken: int
    hits: int
    late: int
    ahead: int
    ahead_used: int
    read_bytes: int
    memory_bytes: int
    moved: int
    wait_seconds: float

    @property
    def hit_share(self) -> float:
        """Share of units that were in memory when they were taken."""
        return self.hits / self.taken if self.taken else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return vars(self) | {"hit_share": self.hit_share}
