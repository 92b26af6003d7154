"""Opening the hot side of a mixture of experts: what fits, where the memory comes from, and in which form
each matrix is kept."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from powerinfer_tools.ffn_weights import DenseFFN, ExpertsFFN
from powerinfer_tools.hot.assembly import UNPACKED_LIMIT
from powerinfer_tools.hot.devices import CpuDevice, Device, OutOfDeviceMemory
from powerinfer_tools.hot.executor import Exchange
from powerinfer_tools.hot.expert_placement import (
    ExpertWidths,
    HotCounts,
    fit,
    hot_size,
    planned,
    products_of,
    scratch_floats,
    widths_of,
)
from powerinfer_tools.hot.expert_routes import SHARED, HotExpertSide
from powerinfer_tools.hot.expert_side import ExpertBackend, RouteExchange, TorchExpertSide
from powerinfer_tools.hot.experts import ExpertScratch, HotExpert, HotExperts
from powerinfer_tools.hot.ffn import Inputs
from powerinfer_tools.hot.loading import Arena, Form
from powerinfer_tools.hot.opening import limit_of, opened
from powerinfer_tools.model import Model

_MIB = 1 << 20


@dataclass(frozen=True)
class _Job:
    """What is to be placed: the experts of all layers, how many of each, for batches of ``tokens``."""

    layers: Sequence[ExpertsFFN]
    hot: Sequence[HotCounts]
    widths: ExpertWidths
    activation: tuple[str, float]
    tokens: int


def open_on(
    model: Model, device: str, vram: int | None, tokens: int
) -> tuple[HotExpertSide | None, Sequence[str]]:
    """See :func:`powerinfer_tools.hot.expert_routes.open_hot_experts`."""
    return opened(device, lambda there, fused: open_side(model, there, vram, tokens, fused=fused))


def open_side(
    model: Model, device: Device, vram: int | None, tokens: int, *, fused: bool
) -> tuple[TorchExpertSide | None, list[str]]:
    """The hot side on ``device``, with the Triton kernels where ``fused`` and a row type has them; None where
    nothing is to be computed there, or its memory cannot be had in spite of all counting. Second, what must
    be said. Raises HardwareError for a budget beyond what is free."""
    layers = [layer.ffn for layer in model.layers if isinstance(layer.ffn, ExpertsFFN)]
    assert model.hyper.routing is not None
    widths = widths_of(layers, model.hyper.routing.used)
    limit, notices = limit_of(device.free_bytes(), vram), list[str]()
    hot = fit(layers, limit, widths, tokens)
    wanted = sum(counts.experts + counts.shared for counts in planned(layers))
    found = sum(counts.experts + counts.shared for counts in hot)
    if limit is not None and vram is None and found < wanted:
        notices.append(
            f"{found} of the plan's {wanted} hot experts fit in the {limit // _MIB} MiB of VRAM that can be "
            "used; the others are computed on the CPU"
        )
    if not any(hot):
        device.close()
        return None, notices
    job = _Job(layers, hot, widths, (model.hyper.activation, model.hyper.activation_cut), tokens)
    try:
        backend, kinds = _load(job, device, fused=fused)
    except OutOfDeviceMemory as error:
        device.close()
        return None, [*notices, f"out of VRAM at the start: {error}; everything is computed on the CPU"]
    if kinds:
        notices.append(
            f"{', '.join(kinds)} rows have no fused GPU kernel; torch operations unpack them, which is slower"
        )
    spare = None if device.free_bytes() is None else partial(_spare, job)
    size = hot_size(layers, hot, widths, tokens)
    return TorchExpertSide(backend, spare, size, notices), notices


def _spare(job: _Job) -> ExpertBackend:
    return _load(job, CpuDevice(), fused=False)[0]


def _load(job: _Job, device: Device, *, fused: bool) -> tuple[ExpertBackend, list[str]]:
    """Everything on the device, and the row types that were to be fused and cannot."""
    chosen = [_experts_of(layer, counts) for layer, counts in zip(job.layers, job.hot, strict=True)]
    weights = [w for experts in chosen for ffn in experts.values() for w in ffn.matrices]
    values = sum(weight.rows * weight.columns for weight in weights)
    arena = Arena()
    form = Form(arena, fused=fused, unpack=device.free_bytes() is None and 4 * values <= UNPACKED_LIMIT)
    _take(job, form, chosen)
    arena.fill(device.allocate(arena.nbytes))
    space, layers = _take(job, form, chosen)
    rounded = not all(weight.row_type.is_float for layer in job.layers for weight in products_of(layer))
    exchange, routes = _exchange(job, device, space), _routes(job, device, space)
    backend = ExpertBackend(device, layers, exchange, routes, _scratch(job, space), rounded=rounded)
    return backend, sorted(form.not_fused)


def _take(
    job: _Job, form: Form, chosen: Sequence[dict[int, DenseFFN]]
) -> tuple[dict[str, torch.Tensor], list[HotExperts | None]]:
    """All pieces of memory, in a fixed order: scratch by name, and the experts of each layer."""
    pieces = scratch_floats(job.widths, job.tokens)
    space = {name: form.memory.floats(count) for name, count in pieces.items()}
    return space, [_layer(form, experts, job.activation) if experts else None for experts in chosen]


def _layer(form: Form, experts: dict[int, DenseFFN], activation: tuple[str, float]) -> HotExperts:
    made = {}
    for number, ffn in experts.items():
        gate, up, down = (form.product(weight) for weight in ffn.matrices)
        made[number] = HotExpert(gate, up, down, activation)
    return HotExperts(made)


def _experts_of(layer: ExpertsFFN, counts: HotCounts) -> dict[int, DenseFFN]:
    """What is hot of a layer, by number."""
    assert layer.places is not None
    experts = {expert: layer.expert(expert) for expert in layer.places.order[: counts.experts]}
    if counts.shared:
        assert layer.shared is not None
        experts[SHARED] = layer.shared
    return experts


def _inputs(job: _Job, space: dict[str, torch.Tensor], name: str) -> Inputs:
    """Exact and rounded, one tensor where all rows take the same."""
    kinds = [space[f"{name} {kind}"].view(job.tokens, job.widths.width) for kind in range(job.widths.inputs)]
    return Inputs(kinds[0], kinds[-1])


def _exchange(job: _Job, device: Device, space: dict[str, torch.Tensor]) -> Exchange:
    shape = (job.tokens, job.widths.width)
    staging = [device.staging(*shape) for _ in range(job.widths.inputs)]
    return Exchange(
        Inputs(staging[0], staging[-1]),
        device.staging(*shape),
        _inputs(job, space, "input"),
        space["out"].view(*shape),
    )


def _routes(job: _Job, device: Device, space: dict[str, torch.Tensor]) -> RouteExchange:
    shape = (2, job.tokens * job.widths.taken)
    return RouteExchange(device.staging(*shape), space["routes"].view(*shape))


def _scratch(job: _Job, space: dict[str, torch.Tensor]) -> ExpertScratch:
    taken = _inputs(job, space, "taken")
    return ExpertScratch(space["chunk"], taken, space["gate"], space["up"])
