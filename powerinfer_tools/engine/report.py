"""What an engine tells about its own work."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Memory:
    """Bytes that the engine holds, by purpose; ``vram`` is what was planned for the hot device and allocated,
    ``vram_peak`` the most that its allocator held (None where it does not count)."""

    weights: int
    kv_cache: int
    scratch: int
    vram: int
    vram_peak: int | None = None

    @property
    def total(self) -> int:
        """Everything outside the hot device, in bytes."""
        return self.weights + self.kv_cache + self.scratch


@dataclass(frozen=True)
class EngineReport:
    """Counters of an engine since it was made.

    ``bytes_per_token`` is the mean number of bytes of weights and KV cache that one decoded token had to
    touch; ``density`` the mean share of FFN neurons computed, or of routed experts that a token takes;
    ``experts`` how many those are, and of how many, None without experts; ``recall`` the share of active
    neurons that predictors found, None where it was not checked; ``timings`` seconds by part ("attention",
    "ffn", …); ``load_seconds`` the time to lay the weights out for the kernels and allocate.
    """

    mode: str
    device: str
    threads: int
    isa: str
    prompt_tokens: int
    prompt_seconds: float
    decode_tokens: int
    decode_seconds: float
    bytes_per_token: float
    density: float
    experts: tuple[int, int] | None
    recall: float | None
    timings: dict[str, float]
    memory: Memory
    kv_type: str
    load_seconds: float

    @property
    def overlap(self) -> float | None:
        """Share of the hot side's time in which the CPU computed, too; None without a hot side."""
        hot = self.timings.get("hot", 0.0)
        return max(0.0, 1.0 - self.timings["waiting"] / hot) if hot else None

    @property
    def prompt_tokens_per_second(self) -> float:
        """Prompt speed; 0 before any prompt."""
        return self.prompt_tokens / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Decode speed; 0 before any token."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def bytes_per_second(self) -> float:
        """Rate at which decoding touched weights and cache."""
        return self.bytes_per_token * self.decode_tokens_per_second

    def as_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {
            "mode": self.mode,
            "device": self.device,
            "threads": self.threads,
            "isa": self.isa,
            "prompt_tokens": self.prompt_tokens,
            "prompt_tokens_per_second": self.prompt_tokens_per_second,
            "decode_tokens": self.decode_tokens,
            "decode_tokens_per_second": self.decode_tokens_per_second,
            "bytes_per_token": self.bytes_per_token,
            "density": self.density,
            "experts": dict(zip(("used", "count"), self.experts, strict=True)) if self.experts else None,
            "recall": self.recall,
            "kv_type": self.kv_type,
            "load_seconds": self.load_seconds,
            "timings": self.timings,
            "overlap": self.overlap,
            "memory": vars(self.memory) | {"total": self.memory.total},
        }
