"""Advice on a model on a machine: run it as it is, or prepare it first, and the gain of either.

Everything comes from the model's header, the machine's hardware profile and, if there is one, the model's
profile. Speeds are predictions of the plan's cost model. Nothing is computed with the weights.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from powerinfer_formats.plan import Plan
from powerinfer_formats.profile import Profile
from powerinfer_formats.split_layout import bundle_layout
from powerinfer_tools import detect
from powerinfer_tools.engine.memory import MARGIN
from powerinfer_tools.measure.hardware.store import find_hardware
from powerinfer_tools.model.footprint import footprint_of
from powerinfer_tools.model.loading import Model, load_model
from powerinfer_tools.model.matrices import FLOAT_TYPES
from powerinfer_tools.model.shapes import LayerShape, ModelShape, shape_of_model, stored_down_type
from powerinfer_tools.stages.plan import costs
from powerinfer_tools.stages.plan.costs import Machine
from powerinfer_tools.stages.plan.frequencies import Frequencies, model_frequencies
from powerinfer_tools.stages.plan.machine import machine_of
from powerinfer_tools.stages.plan.memory import Workload
from powerinfer_tools.stages.plan.planner import DEFAULT_CONTEXT, Budgets, PlanOptions, plan_outcome

#: A preparation is recommended from this gain on: the spread of a run hides smaller gains.
WORTH = 1.1
#: The largest size, relative to its source, that is accepted of a split file without a gain.
WASTE = 1.02
#: The basis for estimating the time of a profile: the tokens that it reads, and how much faster a prompt is
#: than single tokens (2 to 6 times were measured, docs/LOG.md).
PROFILE_TOKENS, PROMPT_SPEEDUP = 47_000, 3.0


@dataclass(frozen=True)
class Way:
    """One way to run the model. ``tokens_per_second`` None: it depends on a profile that does not exist.
    ``minutes``: roughly how long the ``commands`` that prepare it take."""

    name: str
    tokens_per_second: float | None
    exact: bool
    detail: str
    commands: tuple[str, ...] = ()
    minutes: float = 0.0


@dataclass(frozen=True)
class Advice:
    """Facts (sizes in bytes), ways to run, and the ``verdict`` in one or two sentences. ``fits``: weights and
    KV cache are below the free memory (``free_bytes``; 0: unknown)."""

    model: str
    family: str
    activation: str
    true_zeros: bool
    experts: str
    weight_bytes: int
    cache_bytes: int
    context: int
    free_bytes: int
    fits: bool
    machine: str
    accelerator: str
    ways: tuple[Way, ...]
    verdict: str
    notice: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return vars(self) | {"ways": [vars(way) for way in self.ways]}


def advise(path: Path, *, profile: Path | None = None, hardware: str | None = None) -> Advice:
    """Advice on the model at ``path``, with its ``profile`` if there is one, for this machine or for the
    machine that ``hardware`` names.

    Raises ModelError, FormatError, HardwareError, and PlanError for a profile of another model.
    """
    machine_profile = find_hardware(hardware)
    machine = machine_of(machine_profile.profile)
    model = load_model(path)
    try:
        shape = shape_of_model(model)
        counted = None if profile is None else Profile.load(profile)
        frequencies = model_frequencies(shape, counted)
        here = hardware is None
        free = detect.available_ram_bytes() if here else machine.ram_bytes
        return _advice(model, shape, machine, frequencies, free, machine_profile.note)
    finally:
        model.close()


@dataclass(frozen=True)
class SplitVerdict:
    """What to expect of a plan's split file on this machine, in words for the user (empty: nothing to say).
    ``growth``: its bytes over the source's. ``in_vain``: it is larger, skips nothing and places nothing on an
    accelerator."""

    text: str = ""
    growth: float = 1.0
    in_vain: bool = False


def split_verdict(path: Path, plan: Plan) -> SplitVerdict:
    """The split file of ``plan`` compared with its source at ``path``, before it is written: its size, and
    its speed if this machine is not the one for which the plan was made."""
    model = load_model(path)
    try:
        if not model.is_source:
            return SplitVerdict()  # convert refuses it
        shape, size = shape_of_model(model), model.source.nbytes
    finally:
        model.close()
    hot = sum(layer.hot_neurons for layer in plan.layers)
    sparse = {layer.mode for layer in plan.layers} - {"dense"}
    parts, growth = [], 1.0
    if shape.ffn_layers:
        growth += sum(
            _split_bytes(layer, columns=not hot and planned.mode == "dense")
            - sum(matrix.nbytes for matrix in layer.ffn)
            for layer, planned in zip(shape.layers, plan.layers, strict=False)
            if layer.experts is None
        ) / max(size, 1)
        parts.append(f"it takes {growth:.2f} × the bytes of its source")
    if hot and detect.nvidia_driver() is None:
        parts.append(
            f"{hot:,} of its neurons are planned for {plan.hardware.gpu or 'an accelerator'}, which this "
            "machine does not have: here all of them are computed on the CPU"
        )
    if not sparse and (not hot or detect.nvidia_driver() is None):
        parts.append("no neuron is skipped, so here it is no faster than the source (powerinfer bench A B)")
    elsewhere = hot or any(unit.device == "gpu" for unit in plan.units)
    elsewhere = elsewhere or any(layer.attention == "gpu" for layer in plan.layers)
    return SplitVerdict("; ".join(parts), growth, not sparse and not elsewhere and growth > WASTE)


def _split_bytes(layer: LayerShape, *, columns: bool) -> int:
    """Bytes of a layer's FFN in a split file: records and, with ``columns``, the source's down projection."""
    down, transposed = layer.down, layer.down_transposed
    stored = stored_down_type(down.row_type, None, transposed=transposed)
    gate = None if layer.gate is None else layer.gate.row_type
    records = bundle_layout(gate, layer.up.row_type, stored, layer.up.columns).record_bytes * layer.neurons
    kept = columns and not transposed and down.row_type not in FLOAT_TYPES
    return records + (down.nbytes if kept else 0)


def dense_seconds(shape: ModelShape, machine: Machine, workload: Workload) -> float:
    """Seconds of one token of the source file on the CPU: its bytes at the speed of streams."""
    total = costs.head_seconds(shape, machine).cpu
    for layer in shape.layers:
        total += costs.attention_seconds(shape, layer, machine, workload).cpu
        ffn = sum(matrix.packed_nbytes for matrix in layer.ffn)
        if layer.experts is not None:
            ffn *= layer.experts.used
            ffn += sum(matrix.packed_nbytes for matrix in (*layer.experts.router, *layer.experts.shared))
        total += ffn / machine.bandwidth
    return total


def _advice(
    model: Model, shape: ModelShape, machine: Machine, frequencies: Frequencies, free: int, notice: str
) -> Advice:
    hyper = model.hyper
    context = min(DEFAULT_CONTEXT, hyper.trained_context)
    weights = sum(info.nbytes for info in model.source.tensors.values())
    cache = footprint_of(model).session_bytes(context, "f16")
    fits = not free or footprint_of(model).packed_nbytes + cache + MARGIN <= free
    ways = _ways(model, shape, machine, frequencies)
    routing = hyper.routing
    return Advice(
        model=model.name,
        family=model.spec.name,
        activation=hyper.activation,
        true_zeros=model.exact_zeros,
        experts="" if routing is None else f"{routing.used} of {routing.experts} for a token",
        weight_bytes=weights,
        cache_bytes=cache,
        context=context,
        free_bytes=free,
        fits=fits,
        machine=machine.name,
        accelerator=machine.gpu.name if machine.gpu else "none",
        ways=ways,
        verdict=_verdict(model, ways, fits=fits),
        notice=notice,
    )


def _ways(model: Model, shape: ModelShape, machine: Machine, frequencies: Frequencies) -> tuple[Way, ...]:
    workload = Workload(min(DEFAULT_CONTEXT, shape.trained_context), 1, "f16")
    dense = 1.0 / dense_seconds(shape, machine, workload)
    path = model.path
    ways = [
        Way("as it is", dense, True, "every byte is read for every token", (f"powerinfer run -m {path} -i",))
    ]
    if not model.is_source:
        return tuple(ways)
    prepare = tuple(f"powerinfer {stage} -m {path}" for stage in ("profile", "plan", "convert"))
    minutes = PROFILE_TOKENS / (PROMPT_SPEEDUP * dense) / 60
    if model.exact_zeros and not shape.routed:
        ways.append(_sparse_way(shape, machine, frequencies, prepare, minutes))
    if machine.gpu is not None:
        speed = _planned_speed(shape, machine, frequencies)
        text = f"the plan places what is busy on {machine.gpu.name}; predicted, not yet confirmed on any GPU"
        ways.append(Way("split", speed, True, text, prepare, minutes))
    return tuple(ways)


def _sparse_way(
    shape: ModelShape, machine: Machine, frequencies: Frequencies, commands: tuple[str, ...], minutes: float
) -> Way:
    """Gate-first on the CPU: up and down rows are read only where the gate is positive."""
    if frequencies.layers is None:
        text = "true zeros are skipped without changing a bit; how many there are, a profile counts"
        return Way("gate-first", None, True, text, commands, minutes)
    neurons = sum(len(layer) for layer in frequencies.layers)
    density = sum(float(layer.sum()) for layer in frequencies.layers) / neurons
    speed = _planned_speed(shape, replace(machine, gpu=None), frequencies)
    text = f"{density:.0%} of the neurons fire for a token ({frequencies.source}); the others change no bit"
    return Way("gate-first", speed, True, text, commands[1:], 0.0)


def _planned_speed(shape: ModelShape, machine: Machine, frequencies: Frequencies) -> float:
    return 1.0 / plan_outcome(shape, frequencies, machine, Budgets(), PlanOptions()).placement.seconds


def _verdict(model: Model, ways: tuple[Way, ...], *, fits: bool) -> str:
    if not fits:
        return (
            "The weights and the KV cache do not fit in the memory that is free: take a smaller context "
            "(-c), --kv-type q8_0, or the model in a smaller row type."
        )
    dense = ways[0].tokens_per_second or 0.0
    paying = [way for way in ways[1:] if (way.tokens_per_second or 0.0) >= WORTH * dense]
    if paying:
        best = max(paying, key=lambda way: way.tokens_per_second or 0.0)
        gain = (best.tokens_per_second or 0.0) / dense
        return f"Prepare it: {best.name} is expected to be {gain:.2f} × as fast. {' && '.join(best.commands)}"
    unknown = [way for way in ways[1:] if way.tokens_per_second is None]
    if unknown:
        return (
            "It has true zeros, so it may pay to prepare it. Count them first: "
            f"{unknown[0].commands[0]} --corpus FILE, then ask again."
        )
    return f"Just run it: {_reason(model, ways)} {ways[0].commands[0]}"


def _reason(model: Model, ways: tuple[Way, ...]) -> str:
    if not model.is_source:
        return "it is prepared already."
    if model.hyper.routing is not None:
        return "its router chooses experts already, and without an accelerator there is nothing to place."
    if not model.exact_zeros:
        name = model.hyper.activation
        return f"{name} makes no true zeros, so nothing can be skipped without changing answers."
    return "too few neurons are idle for skipping them to pay." if len(ways) > 1 else ""
