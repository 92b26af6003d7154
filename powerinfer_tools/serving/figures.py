"""The batcher's counters, for /metrics and for the page. Written by its thread, read by others."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from powerinfer_tools.serving.jobs import Ended
from powerinfer_tools.serving.slots import Work

#: Weight of the newest request in the mean time of a request.
_NEWEST = 0.1


@dataclass
class Figures:
    """Totals since the start. The seconds of a pass are divided between prompts and texts by their tokens."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    restored_tokens: int = 0
    prompt_seconds: float = 0.0
    tokens: int = 0
    token_seconds: float = 0.0
    passes: int = 0
    busy_slots: int = 0
    longest: int = 0
    requests: int = 0
    interrupted: int = 0
    request_seconds: float = 1.0
    step_seconds: float = 0.0

    def began(self, reused: int) -> None:
        """A request got a place that held ``reused`` of its tokens."""
        self.cached_tokens += reused

    def passed(self, pieces: Sequence[tuple[Any, Work]], seconds: float) -> None:
        """One pass over the model."""
        prompt = sum(len(work.tokens) for ticket, work in pieces if ticket.sequence.in_prompt)
        written = sum(1 for ticket, _ in pieces if not ticket.sequence.in_prompt)
        share = prompt / max(1, prompt + written)
        self.prompt_tokens += prompt
        self.prompt_seconds += share * seconds
        self.token_seconds += (1 - share) * seconds
        self.passes += 1
        self.busy_slots += len(pieces)
        self.step_seconds = seconds

    def wrote(self, count: int, seconds: float) -> None:
        """One pass over one token of each of ``count`` texts."""
        self.token_seconds += seconds
        self.passes += 1
        self.busy_slots += count
        self.step_seconds = seconds

    def ended(self, ended: Ended) -> None:
        """A request left its place."""
        self.requests += 1
        self.interrupted += ended.outcome == "interrupted"
        self.longest = max(self.longest, ended.prompt_tokens + ended.tokens)
        seconds = ended.prompt_seconds + ended.decode_seconds
        self.request_seconds += _NEWEST * (seconds - self.request_seconds)
