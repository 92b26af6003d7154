"""The times at which each part of one token ran, in the JSON that Perfetto and Chrome's tracing show."""

import json
import os
from dataclasses import dataclass
from typing import Any

from powerinfer_formats.atomic import write_atomic

#: The rows of the picture, from above.
TRACKS = ("CPU", "hot side")


@dataclass(frozen=True)
class Event:
    """``name`` ran on ``track`` from ``start`` to ``end``, in seconds of ``time.perf_counter``; ``layer`` is
    None for work outside the layers."""

    track: str
    name: str
    layer: int | None
    start: float
    end: float


class Timeline:
    """The events of the last token that was decoded."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def restart(self) -> None:
        """Forget all events: another token begins."""
        self.events.clear()

    def add(self, track: str, name: str, layer: int | None, start: float, end: float) -> None:
        """Add one event."""
        self.events.append(Event(track, name, layer, start, end))

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the trace-event form (microseconds since the first event) to ``path``, completely or not at
        all."""
        zero = min((event.start for event in self.events), default=0.0)
        rows: list[dict[str, Any]] = [
            {"ph": "M", "name": "thread_name", "pid": 1, "tid": index, "args": {"name": track}}
            for index, track in enumerate(TRACKS)
        ]
        rows += [
            {
                "ph": "X",
                "name": event.name,
                "pid": 1,
                "tid": TRACKS.index(event.track),
                "ts": round(1e6 * (event.start - zero), 3),
                "dur": round(1e6 * (event.end - event.start), 3),
                "args": {} if event.layer is None else {"layer": event.layer},
            }
            for event in self.events
        ]
        with write_atomic(path) as stream:
            stream.write(json.dumps({"displayTimeUnit": "ms", "traceEvents": rows}, indent=1).encode())


def tell(timeline: Timeline | None, layer: int | None, **parts: tuple[float, float]) -> None:
    """Record spans of CPU time, if a timeline is kept."""
    if timeline is not None:
        for name, (start, end) in parts.items():
            timeline.add("CPU", name, layer, start, end)
