"""Opening the hot side: the device, the part of the plan that fits on it, and notices for the user."""

from collections.abc import Callable, Sequence
from functools import partial

from powerinfer_formats.split import SplitLayer
from powerinfer_tools.engine.hot import HotSide
from powerinfer_tools.engine.hot.assembly import assemble
from powerinfer_tools.engine.hot.backend import Backend
from powerinfer_tools.engine.hot.compiling import Compilation
from powerinfer_tools.engine.hot.cuda_checks import cuda_problem
from powerinfer_tools.engine.hot.devices import CpuDevice, CudaDevice, Device
from powerinfer_tools.engine.hot.executor import TorchHotSide
from powerinfer_tools.engine.hot.faults import DeviceLost, KernelRefused, OutOfDeviceMemory
from powerinfer_tools.engine.hot.fusing import fusing_problem
from powerinfer_tools.engine.hot.limits import attention_limit
from powerinfer_tools.engine.hot.placement import HotUnits, Workload, fit, units_size
from powerinfer_tools.errors import HardwareError
from powerinfer_tools.model.device_memory import MARGIN, overhead
from powerinfer_tools.model.loading import Model
from powerinfer_tools.progress import Progress

_MIB = 1 << 20
#: Number of attempts to fit units into a budget, each corrected by the memory that the previous one took.
_FITS = 5


def open_on(
    model: Model, device: str, vram: int | None, work: Workload, progress: Progress | None = None
) -> tuple[HotSide | None, Sequence[str]]:
    """See :func:`powerinfer_tools.engine.hot.open_hot_side`."""
    if device == "cpu":
        return open_side(model, CpuDevice(), vram, work, fused=False)
    problem = cuda_problem()
    if problem is not None:
        return None, [f"--device cuda: {problem}; everything is computed on the CPU"]
    if progress is None:
        return _open_cuda(model, vram, work, None)
    kernels = Compilation(progress)
    with kernels.told():
        return _open_cuda(model, vram, work, kernels)


def _open_cuda(
    model: Model, vram: int | None, work: Workload, kernels: Compilation | None
) -> tuple[HotSide | None, Sequence[str]]:
    try:
        reason, gpu = fusing_problem(), CudaDevice()
        rehearse = None if kernels is None or reason is not None else partial(kernels.count, gpu)
        try:
            side, notices = open_side(model, gpu, vram, work, fused=reason is None, rehearse=rehearse)
        except KernelRefused as error:
            reason, gpu = f"one that is needed could not be built or launched ({error})", CudaDevice()
            side, notices = open_side(model, gpu, vram, work, fused=False)
    except DeviceLost as error:
        return None, [f"the GPU stopped working at the start ({error}); everything is computed on the CPU"]
    if side is None:
        return None, notices
    if reason is not None:
        side.notices.append(
            f"no fused GPU kernels: {reason}; torch operations unpack the rows, which is slower"
        )
    side.notices += gpu.notices
    return side, side.notices


def open_side(
    model: Model,
    device: Device,
    vram: int | None,
    work: Workload,
    *,
    fused: bool,
    rehearse: Callable[[Callable[[], None]], None] | None = None,
) -> tuple[TorchHotSide | None, list[str]]:
    """The hot side on ``device``, with the Triton kernels where ``fused`` and a row type has them; None where
    nothing is to be computed there, or its memory cannot be had in spite of all counting. Second, what must
    be said. What was taken of the device's memory is measured; beyond ``vram``, less is placed there.
    ``rehearse``: see :func:`~.assembly.assemble`. Raises HardwareError for a budget beyond what is free."""
    planned, free = planned_units(model, work.predicted), device.free_bytes()
    limit = limit_of(free, vram)
    for _ in range(_FITS):
        units = fit(model, planned, limit, work)
        notices = [*_limits(model), *_left_out(planned, units, limit, has_budget=vram is not None)]
        if not units:
            device.close()
            if planned and vram is not None:
                size = f"{vram / _MIB:.3g} MiB"
                notices = [f"--vram {size}: nothing of the plan fits; everything is computed on the CPU"]
            return None, notices
        made = partial(assemble, model, units, device, work, fused=fused, rehearse=rehearse)
        backend, kinds, problem = _prepared(made, device, work.tokens)
        if backend is None:
            said = f"out of VRAM at the start: {problem}; everything is computed on the CPU"
            return None, [*notices, said]
        taken = _taken(device, free)
        if vram is None or limit is None or taken <= vram:
            break
        # Libraries, modules of kernels and graphs took more than was allowed for.
        backend.close()
        limit -= taken - vram
    else:
        return None, ["--vram is less than the GPU's libraries take; everything is computed on the CPU"]
    if kinds:
        notices.append(
            f"{', '.join(kinds)} rows have no fused GPU kernel; torch operations unpack them, which is slower"
        )
    spare = None
    if device.free_bytes() is not None:
        spare = partial(_spare, model, units, work)
    return TorchHotSide(backend, spare, units_size(model, units, work), notices, taken), notices


def _taken(device: Device, free: int | None) -> int:
    """Bytes that the device has less than the ``free`` ones at first, whoever took them; 0: not known."""
    now = device.free_bytes()
    return 0 if free is None or now is None else max(0, free - now)


def _prepared(
    made: Callable[[], tuple[Backend, Sequence[str]]], device: Device, tokens: int
) -> tuple[Backend | None, Sequence[str], str]:
    """The backend, ready for batches of ``tokens``, and the row types without a fused kernel; or None and,
    last, which memory could not be had. Raises KernelRefused and DeviceLost.

    Without a backend, all that was taken on the device is given back. The device is closed after the
    exception is gone, since its frames hold tensors, which would keep the allocator from freeing them.
    """
    backend, problem = None, ""
    refused: KernelRefused | None = None
    try:
        backend, kinds = made()
        backend.prepare(tokens)
        return backend, kinds, ""
    except OutOfDeviceMemory as error:
        problem = str(error)
    except KernelRefused as error:
        refused = KernelRefused(str(error))
    if backend is None:
        device.close()
    else:
        backend.close()
    if refused is not None:
        raise refused
    return None, (), problem


def planned_units(model: Model, predicted: frozenset[int] = frozenset()) -> HotUnits:
    """The units that the split file's plan places on the hot device, with predictors only in ``predicted``
    layers."""
    devices = model.devices
    here = attention_limit(model) is None
    attention = tuple(device == "gpu" and here for device in devices.attention)
    predictors = tuple(device == "gpu" and i in predicted for i, device in enumerate(devices.predictor))
    assert model.split is not None
    return HotUnits(
        hot=tuple(units.hot for units in model.split.units),
        attention=attention,
        predictors=predictors,
        head=devices.head == "gpu",
        are_neurons=tuple(isinstance(layer.feeds, SplitLayer) for layer in model.layers),
        shared=tuple(units.shared_hot for units in model.split.units),
    )


def _limits(model: Model) -> list[str]:
    """The parts of the plan that torch does not compute, in words."""
    limit = attention_limit(model)
    if limit is None or "gpu" not in model.devices.attention:
        return []
    return [f"the hot side does not compute {limit}; the attention is computed on the CPU"]


def _left_out(planned: HotUnits, units: HotUnits, limit: int | None, *, has_budget: bool) -> list[str]:
    """The parts of the plan that do not fit, in words. Nothing is said about neurons (or experts) that give
    way to a requested budget (``has_budget``)."""
    only_ffns = (units.attention, units.head) == (planned.attention, planned.head)
    if units == planned or limit is None or (has_budget and only_ffns):
        return []
    fitting, every = (sum(some.hot) + sum(some.shared) for some in (units, planned))
    kinds = {True: "neurons", False: "experts"}
    names = " and ".join(kinds[neurons] for neurons in sorted({*units.are_neurons}, reverse=True))
    parts = [f"{fitting} of the plan's {every} hot {names}"]
    if units.attention != planned.attention:
        parts.append(f"{sum(units.attention)} of its {sum(planned.attention)} attention blocks")
    if units.head != planned.head:
        parts.append("not its output head")
    return [
        f"{', '.join(parts)} fit in the {limit // _MIB} MiB of VRAM that can be used; the others are "
        "computed on the CPU"
    ]


def limit_of(free: int | None, vram: int | None) -> int | None:
    """Bytes for weights, KV cache and scratch: of the budget asked for, or of what is ``free``; None: no
    limit. Raises HardwareError for a budget beyond that."""
    if free is None:
        return vram
    if vram is not None and vram > free:
        raise HardwareError(
            f"--vram {vram // _MIB} MiB: the GPU has {free // _MIB} MiB free; ask for less (the split point "
            "moves, nothing is reconverted), or leave --vram out to use what is free"
        )
    budget = max(0, free - MARGIN) if vram is None else vram
    return budget - overhead(budget)


def _spare(model: Model, units: HotUnits, work: Workload) -> Backend:
    return assemble(model, units, CpuDevice(), work, fused=False)[0]
