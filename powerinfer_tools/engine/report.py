"""An engine's report about its own work."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Self

from powerinfer_tools.engine.disk_report import DiskReport
from powerinfer_tools.engine.drafting import Drafter
from powerinfer_tools.model.loading import Model


@dataclass(frozen=True)
class Memory:
    """Bytes that the engine holds, by purpose. ``vram`` is the memory planned for the hot device and
    allocated. ``vram_peak`` is the most that its allocator held, or that was missing from its free memory
    (None: not counted)."""

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
class DraftReport:
    """Counters of drafts: how many tokens were guessed, and how many of them were ``accepted``; ``passes``
    over the layers, and the tokens of a pass; ``speed_up`` relative to decoding token by token. None: nothing
    was decoded that way."""

    drafted: int
    accepted: int
    accepted_share: float | None
    passes: int
    tokens_per_pass: float | None
    speed_up: float | None

    @classmethod
    def of(cls, drafter: Drafter) -> Self:
        """The counters of ``drafter``."""
        counters = drafter.counters
        return cls(
            drafted=counters.drafted,
            accepted=counters.accepted,
            accepted_share=counters.accepted / counters.drafted if counters.drafted else None,
            passes=counters.passes,
            tokens_per_pass=counters.tokens / counters.passes if counters.passes else None,
            speed_up=drafter.speed_up,
        )


@dataclass(frozen=True)
class EngineReport:
    """The counters of one session, and of the weights that it uses, since their creation.

    ``bytes_per_token`` is the mean number of bytes of weights and KV cache that one decoded token had to
    touch; ``density`` the mean share of FFN neurons computed, or of routed experts that a token takes;
    ``experts`` how many those are, and of how many, None without experts; ``recall`` the share of active
    neurons that predictors found, by naming ``predicted_density`` of all, None where it was not checked;
    ``prediction_cost`` and ``threshold_cost`` what leaving neurons out costs in quality, as measured when the
    file was made, None for exact modes; ``timings`` seconds by part ("attention",
    "ffn", …); ``disk``: None where all experts are in memory;
    ``load_seconds`` the time to lay the weights out for the kernels and allocate.
    """

    model: str
    path: str
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
    recall_by_layer: list[float | None] | None
    predicted_density: float | None
    prediction_cost: dict[str, float] | None
    threshold_cost: dict[str, float] | None
    drafts: DraftReport | None
    timings: dict[str, float]
    memory: Memory
    kv_type: str
    load_seconds: float
    disk: DiskReport | None = None

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
            "model": self.model,
            "path": self.path,
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
            "recall_by_layer": self.recall_by_layer,
            "predicted_density": self.predicted_density,
            "prediction_cost": self.prediction_cost,
            "threshold_cost": self.threshold_cost,
            "drafts": vars(self.drafts) if self.drafts is not None else None,
            "kv_type": self.kv_type,
            "load_seconds": self.load_seconds,
            "timings": self.timings,
            "disk": self.disk.as_dict() if self.disk else None,
            "overlap": self.overlap,
            "memory": vars(self.memory) | {"total": self.memory.total},
        }


def costs_of(model: Model, modes: Collection[str]) -> tuple[dict[str, float] | None, dict[str, float] | None]:
    """The quality cost of predictors and of thresholds, as measured when they were made. Either is None if
    ``modes`` do not use it or it was not measured."""
    header = model.split.header if model.split is not None else None
    predicted = thresholded = None
    if header is not None and header.prediction is not None and "predicted" in modes:
        names = ("perplexity", "predicted_perplexity", "divergence", "max_increase")
        cost = header.prediction.cost
        predicted = None if cost is None else dict(zip(names, cost, strict=True))
    if header is not None and header.thresholding is not None and "thresholded" in modes:
        _, _, error, kl, allowed = header.thresholding.cost
        increase = header.thresholding.increase
        thresholded = {"perplexity_increase": increase, "error": error, "kl": kl, "allowed": allowed}
    return predicted, thresholded
