"""The plan stage: from names and files to a plan. The maths is in
:mod:`powerinfer_tools.planning.planner`."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from powerinfer_formats.hardware import HardwareProfile
from powerinfer_formats.plan import Plan
from powerinfer_formats.profile import Profile
from powerinfer_tools.errors import PlanError
from powerinfer_tools.planning.frequencies import model_frequencies
from powerinfer_tools.planning.machine import machine_of
from powerinfer_tools.planning.plan_file import plan_of
from powerinfer_tools.planning.planner import Budgets, Outcome, PlanOptions, plan_outcome
from powerinfer_tools.planning.predictions import predictions, sensitivity
from powerinfer_tools.planning.published import published_shape
from powerinfer_tools.planning.shapes import ModelShape, shape_of_model


@dataclass(frozen=True)
class PlanRequest:
    """What the user asks for: either ``model`` (a GGUF file) or ``shape`` (a name) stored as ``dtype``.

    ``hardware``: a file or a preset's name; None: this machine's stored profile. Bytes None: what the machine
    has, less a margin. ``context`` None: 4,096 or what the model was trained for, whichever is less.
    """

    model: Path | None = None
    shape: str | None = None
    dtype: str = "q4_0"
    profile: Path | None = None
    hardware: str | None = None
    vram_bytes: int | None = None
    ram_bytes: int | None = None
    context: int | None = None
    objective: Literal["time", "frequency"] = "time"
    group: int = 64
    threads: int | None = None


def plan_request(request: PlanRequest) -> Plan:
    """The plan for ``request``.

    Raises PlanError (no plan exists, or the inputs do not belong together), HardwareError, ModelError and
    FormatError, each in one line.
    """
    from powerinfer_tools.hardware import find_hardware

    shape = _shape(request)
    profile = None if request.profile is None else Profile.load(request.profile)
    hardware = find_hardware(request.hardware, wants_gpu=bool(request.vram_bytes))
    plan = make_plan(
        shape,
        profile,
        hardware.profile,
        Budgets(request.vram_bytes, request.ram_bytes),
        PlanOptions(objective=request.objective, group=request.group, context=request.context),
    )
    return replace(plan, verdict=f"{plan.verdict} {hardware.note}") if hardware.note else plan


def make_plan(
    shape: ModelShape,
    profile: Profile | None,
    hardware: HardwareProfile,
    budgets: Budgets,
    options: PlanOptions,
) -> Plan:
    """Place ``shape`` on ``hardware``. Equal inputs give equal plans, byte for byte. Raises PlanError."""
    outcome = outcome_of(shape, profile, hardware, budgets, options)
    better = sensitivity(shape, outcome.frequencies, outcome.machine, budgets, options)
    return replace(plan_of(outcome, hardware, profile), predictions=predictions(outcome), sensitivity=better)


def outcome_of(
    shape: ModelShape,
    profile: Profile | None,
    hardware: HardwareProfile,
    budgets: Budgets,
    options: PlanOptions,
) -> Outcome:
    """As :func:`make_plan`, with the tables behind the plan."""
    frequencies = model_frequencies(shape, profile)
    return plan_outcome(shape, frequencies, machine_of(hardware), budgets, options)


def _shape(request: PlanRequest) -> ModelShape:
    if (request.model is None) == (request.shape is None):
        raise PlanError("a plan needs either a model (-m FILE) or a shape (--shape NAME)")
    if request.shape is not None:
        return published_shape(request.shape, request.dtype)
    from powerinfer_tools.model import load_model

    assert request.model is not None
    model = load_model(request.model)
    try:
        return shape_of_model(model)
    finally:
        model.close()
