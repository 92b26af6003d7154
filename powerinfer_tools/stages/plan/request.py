"""The plan stage: from names and files to a plan. The maths is in
:mod:`powerinfer_tools.stages.plan.planner`."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from powerinfer_formats.hardware import HardwareProfile
from powerinfer_formats.plan import Plan
from powerinfer_formats.profile import Profile
from powerinfer_tools import detect
from powerinfer_tools.errors import PlanError
from powerinfer_tools.model.published import PREDICTOR_SHARE, PREDICTOR_TYPE, published_shape
from powerinfer_tools.model.shapes import ModelShape, shape_of_model
from powerinfer_tools.stages.plan.capabilities import ALL_PLACED, THIS_VERSION, Capabilities
from powerinfer_tools.stages.plan.frequencies import Frequencies, model_frequencies
from powerinfer_tools.stages.plan.machine import machine_of
from powerinfer_tools.stages.plan.offer import Offer, offer
from powerinfer_tools.stages.plan.plan_file import plan_of
from powerinfer_tools.stages.plan.planner import RAM_MARGIN_SHARE, Budgets, PlanOptions, plan_outcome
from powerinfer_tools.stages.plan.predictions import all_in_memory, predictions, sensitivity
from powerinfer_tools.stages.plan.thresholded_shapes import ThresholdOffer, offer_thresholds


@dataclass(frozen=True)
class PlanRequest:
    """What the user asks for: either ``model`` (a GGUF file) or ``shape`` (a name) stored as ``dtype``.

    ``predictors`` and ``thresholds``: files of the model's, to be used in layers where their measured cost in
    perplexity is within ``max_ppl_increase`` (a share); a shape has predictors of the published size unless
    ``no_predictors``.
    ``hardware``: a file or a preset's name; None: this machine's stored profile. Bytes None: what the machine
    has, less a margin. ``prompt``, ``generate``: tokens of the request whose time counts. ``context`` None:
    4,096 or what the model was trained for, whichever is less.
    """

    model: Path | None = None
    shape: str | None = None
    dtype: str = "q4_0"
    profile: Path | None = None
    predictors: Path | None = None
    thresholds: Path | None = None
    no_predictors: bool = False
    max_ppl_increase: float = 0.0
    hardware: str | None = None
    vram_bytes: int | None = None
    ram_bytes: int | None = None
    context: int | None = None
    kv_type: Literal["f16", "q8_0"] = "f16"
    objective: Literal["time", "frequency"] = "time"
    prompt: int = 0
    generate: int = 1
    group: int = 64
    threads: int | None = None


def plan_request(request: PlanRequest) -> Plan:
    """The plan for ``request``.

    Raises PlanError (no plan exists, or the inputs do not belong together), HardwareError, ModelError and
    FormatError, each in one line.
    """
    from powerinfer_tools.measure.hardware import find_hardware

    shape = _shape(request)
    profile = None if request.profile is None else Profile.load(request.profile)
    hardware = find_hardware(request.hardware, wants_gpu=bool(request.vram_bytes))
    plan = make_plan(
        shape,
        profile,
        hardware.profile,
        Budgets(request.vram_bytes, _ram(request, hardware.profile)),
        PlanOptions(
            objective=request.objective,
            prompt=request.prompt,
            generate=request.generate,
            group=request.group,
            context=request.context,
            kv_type=request.kv_type,
            max_ppl_increase=request.max_ppl_increase,
        ),
        offered=_offered(request, shape),
        thresholds=None
        if request.thresholds is None
        else offer_thresholds(request.thresholds, shape, request.max_ppl_increase),
    )
    notes = " ".join(note for note in (plan.verdict, hardware.note) if note)
    return replace(plan, verdict=notes)


def _ram(request: PlanRequest, hardware: HardwareProfile) -> int | None:
    """The budget that was named. For this machine else what is free, limits of cgroups counted, where that is
    less than the machine's memory without a margin."""
    if request.ram_bytes is not None or request.hardware is not None or request.model is None:
        return request.ram_bytes
    free = detect.available_ram_bytes()
    return free if 0 < free < int(hardware.cpu.ram_bytes * (1 - RAM_MARGIN_SHARE)) else None


def make_plan(
    shape: ModelShape,
    profile: Profile | None,
    hardware: HardwareProfile,
    budgets: Budgets,
    options: PlanOptions,
    *,
    offered: Offer | None = None,
    thresholds: ThresholdOffer | None = None,
) -> Plan:
    """Place ``shape`` on ``hardware``. Equal inputs give equal plans, byte for byte. Raises PlanError.

    ``offered``: the predictors that may be used; None: those that are published for a shape. ``thresholds``:
    those that may be used. The plan of a shape, which no file belongs to, counts on an engine that places
    every unit; where this version cannot, its speed stands beside.
    """
    frequencies = model_frequencies(shape, profile)
    if offered is not None:
        frequencies = replace(frequencies, predictors=offered.layers)
    if thresholds is not None:
        frequencies = replace(frequencies, thresholds=thresholds.layers)
    options = replace(options, engine=_engine_for(shape))
    machine = machine_of(hardware)
    outcome = plan_outcome(shape, frequencies, machine, budgets, options)
    plan = plan_of(outcome, hardware, profile)
    beside = predictions(outcome)
    if shape.fingerprint is None and options.engine != THIS_VERSION:
        today = plan_outcome(shape, frequencies, machine, budgets, replace(options, engine=THIS_VERSION))
        beside["powerinfer-this-version"] = predictions(today)["powerinfer"]
    from_disk = outcome.memory.disk_used > 0
    if from_disk:
        beside["all-in-memory"] = all_in_memory(shape, frequencies, machine, budgets, options)
    return replace(
        plan,
        predictions=beside,
        sensitivity=sensitivity(shape, frequencies, machine, budgets, options, from_disk=from_disk),
        provenance=replace(
            plan.provenance,
            predictors=offered.note if offered else _published_note(frequencies),
            thresholds=thresholds.note if thresholds else "",
        ),
    )


def _engine_for(shape: ModelShape) -> Capabilities:
    """What may be placed of a shape: a model's attention, only where the engine has it on a device."""
    if shape.fingerprint is None:
        return ALL_PLACED
    if shape.placement_limit is not None:
        return replace(THIS_VERSION, placeable=frozenset())
    if shape.attention_limit is None:
        return THIS_VERSION
    return replace(THIS_VERSION, placeable=THIS_VERSION.placeable - {"attention", "head"})


def _offered(request: PlanRequest, shape: ModelShape) -> Offer | None:
    if request.no_predictors:
        return Offer((), "left out (--no-predictors)")
    if request.predictors is None:
        return None
    return offer(request.predictors, shape, request.max_ppl_increase)


def _published_note(frequencies: Frequencies) -> str:
    if not any(frequencies.predictors):
        return "none"
    return f"{100 * PREDICTOR_SHARE:g} % of the model's weights in {PREDICTOR_TYPE.name}, as published"


def _shape(request: PlanRequest) -> ModelShape:
    if (request.model is None) == (request.shape is None):
        raise PlanError("a plan needs either a model (-m FILE) or a shape (--shape NAME)")
    if request.shape is not None:
        return published_shape(request.shape, request.dtype)
    from powerinfer_tools.model.loading import load_model

    assert request.model is not None
    model = load_model(request.model)
    try:
        model.require_placeable(PlanError, "plan")
        return shape_of_model(model)
    finally:
        model.close()
