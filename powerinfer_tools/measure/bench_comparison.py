"""Several engines in turn, each against the first: ratios that hold when the machine's speed drifts."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from powerinfer_tools.engine import Engine
from powerinfer_tools.progress import Progress, Silent


@dataclass(frozen=True)
class ComparisonRow:
    """One test of one engine: the median of tokens per second over the rounds, and of its ratio to the first
    engine's in the same round, with the least and the largest ratio (1 for the first engine itself)."""

    test: str
    name: str
    mode: str
    tokens_per_second: float
    ratio: float
    least_ratio: float
    largest_ratio: float
    rounds: int

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dict(vars(self))


def compare(
    engines: Sequence[tuple[str, Engine]],
    *,
    prompt: int,
    generate: int,
    rounds: int,
    progress: Progress | None = None,
) -> list[ComparisonRow]:
    """Measure ``pp{prompt}`` and ``tg{generate}`` (0 leaves one out) of every named engine, interleaved.

    A round runs every engine once; every second round runs them in reverse order, so that none always follows
    the same one. One untimed round comes first.
    """
    progress = progress or Silent()
    tests: list[tuple[str, int, Callable[[Engine, list[int]], None]]] = []
    if prompt:
        tests.append((f"pp{prompt}", prompt, _prompt))
    if generate:
        tests.append((f"tg{generate}", generate, _generate))
    progress.start("bench", len(tests) * (rounds + 1) * len(engines), "runs")
    rows = []
    for test, count, run in tests:
        speeds = _speeds([engine for _, engine in engines], count, run, rounds, progress)
        rows += [
            _row(test, name, engine, speeds[index], speeds[0]) for index, (name, engine) in enumerate(engines)
        ]
    progress.finish()
    return rows


def _speeds(
    engines: Sequence[Engine],
    count: int,
    run: Callable[[Engine, list[int]], None],
    rounds: int,
    progress: Progress,
) -> list[list[float]]:
    """Tokens per second of each engine in each round."""
    smallest = min(engine.vocabulary for engine in engines)
    tokens = [int(token) for token in np.random.default_rng(0).integers(0, smallest, size=count)]
    speeds: list[list[float]] = [[] for _ in engines]
    for number in range(rounds + 1):
        order = range(len(engines)) if number % 2 else reversed(range(len(engines)))
        for index in order:
            started = time.perf_counter()
            run(engines[index], tokens)
            if number:
                speeds[index].append(count / (time.perf_counter() - started))
            progress.advance(1)
    return speeds


def _row(test: str, name: str, engine: Engine, speeds: list[float], first: list[float]) -> ComparisonRow:
    ratios = [ours / theirs for ours, theirs in zip(speeds, first, strict=True)]
    return ComparisonRow(
        test=test,
        name=name,
        mode=engine.report().mode,
        tokens_per_second=median(speeds),
        ratio=median(ratios),
        least_ratio=min(ratios),
        largest_ratio=max(ratios),
        rounds=len(speeds),
    )


def _prompt(engine: Engine, tokens: list[int]) -> None:
    engine.rewind(0)
    engine.prefill(tokens)


def _generate(engine: Engine, tokens: list[int]) -> None:
    engine.rewind(0)
    for token in tokens:
        engine.decode(token)
