"""What a verification of the cost model consists of: rows of predicted and measured time, and the timing of
single tokens."""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from powerinfer_tools.engine import Engine
from powerinfer_tools.engine.hot.placement import HotUnits, Workload, units_size
from powerinfer_tools.model.loading import Model, load_model

#: Of a figure's samples, the share that kept within the time that counts.
QUANTILE = 0.25
#: Tokens that fill the cache before the clock runs; they are one batch.
PROMPT = BATCH = 16
#: Tokens that are timed, one by one.
DECODED = 12
_CONTEXT = 64
#: Bytes of FFNs beyond which no cache holds a model: more of them measure nothing new.
ENOUGH_BYTES = 640 << 20
NO_TORCH = "torch is not installed: splits with a hot side are left out"
#: Tokens without meaning, for models whose time does not depend on which they are.
ANY_TOKENS = tuple(1 + step % 100 for step in range(PROMPT)) + tuple(
    1 + 37 * step % 100 for step in range(DECODED)
)


@dataclass(frozen=True)
class VerifyRow:
    """One split and mode. Seconds of a token; ``spread``: by how much the median of the samples exceeds the
    time that counts; ``error``: predicted over measured, less 1.

    ``hot_share`` counts neurons, or experts; of those, ``predicted_choices`` is the share of what routers
    choose that is hot by the profile, ``measured_choices`` by the tokens that were timed, with which the
    prediction counts; None without experts.
    """

    device: str
    mode: str
    hot_share: float
    predicted_seconds: float
    measured_seconds: float
    spread: float
    predicted_choices: float | None = None
    measured_choices: float | None = None

    @property
    def error(self) -> float:
        """Relative error of the prediction."""
        return self.predicted_seconds / self.measured_seconds - 1

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return vars(self) | {"error": self.error}


@dataclass(frozen=True)
class Verification:
    """All rows, and what else the reader should know."""

    rows: tuple[VerifyRow, ...]
    notes: tuple[str, ...]

    @property
    def median_error(self) -> float:
        """Median of the absolute relative errors."""
        return median(abs(row.error) for row in self.rows)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        rows = [row.as_dict() for row in self.rows]
        return {"rows": rows, "median_error": self.median_error, "notes": list(self.notes)}


@dataclass(frozen=True)
class Parts:
    """Of the FFNs of a token, all layers: the hot side's work, in a unit of the kind of placement units;
    layers in which it is waited for; and seconds of the cold side."""

    hot_work: float
    waits: float
    cold_seconds: float


@dataclass(frozen=True)
class Decoding:
    """What is timed: a split file's ``mode`` on ``device``, within what ``vram`` says of the model."""

    split: Path
    mode: str
    device: str
    vram: Callable[[Model], int]
    tokens: Sequence[int] = ANY_TOKENS

    def run(self, threads: int | None) -> tuple[list[float], list[float]]:
        """Seconds of single tokens, and, of splits without a hot side, of a token's work that is no FFN's."""
        model = load_model(self.split)
        engine: Engine | None = None
        try:
            vram = None if self.device == "none" else self.vram(model)
            engine = Engine(
                model,
                threads=threads,
                context=_CONTEXT,
                batch=BATCH,
                mode=self.mode,
                device=self.device,
                vram=vram,
            )
            engine.prefill(self.tokens[:PROMPT])
            before, times = _ffn_seconds(engine), []
            for token in self.tokens[PROMPT:]:
                started = time.perf_counter()
                engine.decode(token)
                times.append(time.perf_counter() - started)
            ffn = (_ffn_seconds(engine) - before) / len(times)
            besides = [sum(times) / len(times) - ffn] if self.device == "none" else []
            return times, besides
        finally:
            if engine is not None:
                engine.close()
            model.close()
            del engine, model
            gc.collect()  # parts of an engine refer to each other, and the next one needs as much memory


def vram_of(model: Model, hot: int) -> int:
    """The budget with which the engine places exactly ``hot`` neurons, or experts, of every layer of a split
    file, and nothing else."""
    routed = model.hyper.routing is not None
    units = HotUnits.only([hot] * model.hyper.layers, routed=routed)
    return units_size(model, units, Workload(BATCH, _CONTEXT)).total


def _ffn_seconds(engine: Engine) -> float:
    timings = engine.report().timings
    return timings.get("ffn", 0.0) + timings.get("predictor", 0.0)
