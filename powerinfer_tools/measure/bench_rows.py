"""Rows comparable with llama-bench's: prompt processing (ppN) and token generation (tgN)."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import numpy as np

from powerinfer_tools.engine import Engine
from powerinfer_tools.measure.synthetic.topics import locality_of, text
from powerinfer_tools.progress import Progress, Silent


@dataclass(frozen=True)
class BenchRow:
    """One measured test: mean and standard deviation of tokens per second over ``repetitions``.

    ``bandwidth_share`` is bytes touched per second over the read bandwidth measured just before, 0 … 1.
    ``density``: share of FFN neurons that were computed, 1 in dense modes, or of experts that a token takes.
    ``synthetic``: random weights.
    """

    test: str
    model: str
    mode: str
    device: str
    threads: int
    isa: str
    tokens_per_second: float
    stddev: float
    repetitions: int
    bytes_per_token: float
    bandwidth_share: float
    density: float
    synthetic: bool

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dict(vars(self))


def bench(
    engine: Engine,
    *,
    prompt: int = 512,
    generate: int = 128,
    repetitions: int = 5,
    bandwidth: float,
    progress: Progress | None = None,
) -> list[BenchRow]:
    """Measure ``pp{prompt}`` and ``tg{generate}`` from an empty cache, after one untimed run each; 0 leaves
    one out.

    ``bandwidth`` is the machine's measured read bandwidth in bytes per second.
    """
    progress = progress or Silent()
    rng = np.random.default_rng(0)
    locality, count = locality_of(engine.model.source), max(prompt, generate, 1)
    if locality is None:
        tokens = [int(token) for token in rng.integers(0, engine.vocabulary, size=count)]
    else:
        tokens = text(rng, count, engine.vocabulary, locality)
    tests: list[tuple[str, int, Callable[[], None]]] = []
    if prompt:
        tests.append((f"pp{prompt}", prompt, lambda: _prompt(engine, tokens[:prompt])))
    if generate:
        tests.append((f"tg{generate}", generate, lambda: _generate(engine, tokens[:generate])))
    progress.start("bench", len(tests) * (repetitions + 1), "runs")
    rows = []
    for name, count, run in tests:
        speeds = [count / seconds for seconds in _timed(run, repetitions, progress)]
        rows.append(_row(engine, name, count, speeds, bandwidth))
    progress.finish()
    return rows


def _timed(run: Callable[[], None], repetitions: int, progress: Progress) -> list[float]:
    times = []
    for repetition in range(repetitions + 1):
        started = time.perf_counter()
        run()
        if repetition:
            times.append(time.perf_counter() - started)
        progress.advance(1)
    return times


def _prompt(engine: Engine, tokens: Sequence[int]) -> None:
    engine.rewind(0)
    engine.prefill(tokens)


def _generate(engine: Engine, tokens: Sequence[int]) -> None:
    engine.rewind(0)
    for token in tokens:
        engine.decode(token)


def _row(engine: Engine, name: str, count: int, speeds: list[float], bandwidth: float) -> BenchRow:
    report = engine.report()
    touched = report.bytes_per_token
    if name.startswith("pp"):  # the weights are read once per batch of tokens
        touched = engine.stack.weight_bytes_per_pass() * -(-count // engine.batch) / count
    mean = fmean(speeds)
    return BenchRow(
        test=name,
        model=engine.model.name,
        mode=report.mode,
        device=report.device,
        threads=report.threads,
        isa=report.isa,
        tokens_per_second=mean,
        stddev=stdev(speeds) if len(speeds) > 1 else 0.0,
        repetitions=len(speeds),
        bytes_per_token=touched,
        bandwidth_share=touched * mean / bandwidth if bandwidth else 0.0,
        density=engine.stack.density(),
        synthetic="synthetic" in engine.model.name,
    )
