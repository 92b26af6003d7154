"""Predicted against measured time of a token of a model whose experts are in part on disk alone.

Two budgets are measured: the one that was given, and one halfway to the whole model. The prediction is the
plan's: what a token takes with all experts in memory, or what reading takes, whichever is longer. Which
experts tokens take no profile knows in advance, so predicted times count with what was read for the tokens
that are timed, and the share that the profile lets expect in memory stands beside the share that was.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np
import numpy.typing as npt

from powerinfer_formats.plan import Plan
from powerinfer_formats.profile import Profile
from powerinfer_tools.engine import Engine
from powerinfer_tools.engine.disk_report import DiskReport
from powerinfer_tools.engine.from_disk import RamOptions
from powerinfer_tools.errors import PlanError
from powerinfer_tools.measure.hardware import find_hardware
from powerinfer_tools.model.loading import load_model
from powerinfer_tools.model.shapes import ModelShape, shape_of_model
from powerinfer_tools.progress import Progress, Silent
from powerinfer_tools.stages.plan.costs import Disk
from powerinfer_tools.stages.plan.disk_levels import seconds_of
from powerinfer_tools.stages.plan.frequencies import model_frequencies
from powerinfer_tools.stages.plan.machine import machine_of
from powerinfer_tools.stages.plan.memory import expert_bytes, experts_of
from powerinfer_tools.stages.plan.request import PlanRequest, plan_request
from powerinfer_tools.stages.plan.verification_rows import PROMPT, QUANTILE, Verification, VerifyRow

#: Tokens that are timed: enough for a cache of experts to settle.
_DECODED = 48
_CONTEXT = PROMPT + _DECODED
_SEED = 1
Vector = npt.NDArray[np.float64]


@dataclass(frozen=True)
class _Run:
    """Seconds of single tokens, and what was read and taken for them."""

    times: Sequence[float]
    read_bytes: int
    hits: int
    taken: int


def verify_from_disk(request: PlanRequest, *, progress: Progress | None = None) -> Verification:
    """Measure the model of ``request`` within its budget of RAM, and halfway between that and all of it,
    beside the plan for each.

    Raises PlanError where the model fits in that, and what the engine raises.
    """
    model, profile = request.model, request.profile
    assert model is not None
    assert profile is not None
    progress, first = progress or Silent(), plan_request(request)
    if first.model.experts is None:
        raise PlanError(f"{model}: --verify --ram measures models with experts")
    disk = machine_of(find_hardware(request.hardware, wants_gpu=False).profile).disk
    if not first.memory.disk_used or disk is None:
        raise PlanError(f"{model}: fits in memory, so nothing is read from disk")
    ram = first.budgets.ram_bytes
    budgets = (ram, ram + first.memory.disk_used // 2)
    source = load_model(model)
    try:
        shape = shape_of_model(source)
    finally:
        source.close()
    frequencies = model_frequencies(shape, Profile.load(profile)).layers
    assert frequencies is not None  # there is a profile
    progress.start("measuring", len(budgets), "budgets")
    rows = []
    for budget in budgets:
        plan = plan_request(replace(request, ram_bytes=budget))
        rows.append(_row(shape, frequencies, plan, _run(model, profile, budget, request.threads), disk))
        progress.advance(1)
    progress.finish()
    off = max(abs(row.predicted_choices - row.measured_choices) for row in rows)  # type: ignore[operator]
    note = (
        f"the share of experts that were in memory is off by up to {100 * off:.1f} points, for the tokens "
        "that were timed, from what the profile lets expect"
    )
    return Verification(tuple(rows), (note,))


def _run(model: Path, profile: Path, ram: int, threads: int | None) -> _Run:
    """Tokens drawn from what the model predicts, one after the other."""
    source, random = load_model(model), np.random.default_rng(_SEED)
    try:
        options = RamOptions(ram, "adaptive", profile)
        engine = Engine(source, threads=threads, context=_CONTEXT, batch=PROMPT, ram=options)
        try:
            logits = engine.prefill([1 + step % 100 for step in range(PROMPT)])
            before, times = _disk(engine), list[float]()
            for _ in range(_DECODED):
                scores = logits.astype(np.float64)
                chances = np.exp(scores - scores.max())
                token = int(random.choice(len(chances), p=chances / chances.sum()))
                started = time.perf_counter()
                logits = engine.decode(token)
                times.append(time.perf_counter() - started)
            after = _disk(engine)
        finally:
            engine.close()
    finally:
        source.close()
    read = after.read_bytes - before.read_bytes
    return _Run(times, read, after.hits - before.hits, after.taken - before.taken)


def _disk(engine: Engine) -> DiskReport:
    report = engine.report().disk
    if report is None:
        raise PlanError("the model fits in memory, so nothing is read from disk")
    return report


def _row(shape: ModelShape, frequencies: Sequence[Vector], plan: Plan, run: _Run, disk: Disk) -> VerifyRow:
    whole = plan.predictions["all-in-memory"] if plan.memory.disk_used else plan.predicted
    layer = shape.expert_layers[0]
    every = len(shape.expert_layers) * experts_of(layer).count * expert_bytes(layer).ram
    reading = run.read_bytes / len(run.times) / expert_bytes(layer).vram * seconds_of(layer, disk)
    return VerifyRow(
        device="disk",
        mode="dense",
        hot_share=1 - plan.memory.disk_used / every,
        predicted_seconds=max(1.0 / whole.tokens_per_second, reading),
        # Tokens differ in what they miss, so times are means, as the bytes are.
        measured_seconds=float(np.mean(run.times)),
        spread=median(run.times) / float(np.quantile(run.times, QUANTILE)) - 1,
        predicted_choices=_expected(shape, frequencies, plan),
        measured_choices=run.hits / run.taken,
    )


def _expected(shape: ModelShape, shares_by_layer: Sequence[Vector], plan: Plan) -> float:
    """The share of what routers choose that the experts in memory have, by the profile."""
    shares = []
    for layer, frequencies, placed in zip(shape.layers, shares_by_layer, plan.layers, strict=True):
        if not layer.routed:
            continue
        resident = len(frequencies) - placed.disk_bytes // expert_bytes(layer).ram
        shares.append(float(frequencies[:resident].sum() / frequencies.sum()))
    return sum(shares) / len(shares)
