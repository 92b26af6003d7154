"""Opening the hot side: what fits, where the memory comes from, and in which form each matrix is kept."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from powerinfer_formats.split import SplitLayer
from powerinfer_kernels import RowType, row_bytes
from powerinfer_kernels.triton_layout import PLANAR_TYPES, SPLIT_ROWS, to_planar
from powerinfer_tools.errors import HardwareError
from powerinfer_tools.hot import HotSide
from powerinfer_tools.hot.dequantize import dequantize
from powerinfer_tools.hot.devices import CpuDevice, CudaDevice, Device, OutOfDeviceMemory, cuda_problem
from powerinfer_tools.hot.executor import Backend, Exchange, TorchHotSide
from powerinfer_tools.hot.ffn import FileRows, FusedRows, HotFFN, Inputs, Rows, Scratch, UnpackedRows
from powerinfer_tools.hot.placement import ALIGNMENT, CHUNK_ROWS, MARGIN, OVERHEAD, fit, hot_size
from powerinfer_tools.model import Model

#: Bytes of float32 rows that the CPU device may hold.
UNPACKED_LIMIT = 2 << 30
#: Its name, and the cut of fatrelu.
Activation = tuple[str, float]
_MIB = 1 << 20


def open_on(model: Model, device: str, vram: int | None, tokens: int) -> tuple[HotSide | None, Sequence[str]]:
    """See :func:`powerinfer_tools.hot.open_hot_side`."""
    if device == "cpu":
        return open_side(model, CpuDevice(), vram, tokens, fused=False)
    problem = cuda_problem()
    if problem is not None:
        return None, [f"--device cuda: {problem}; everything is computed on the CPU"]
    reason = fusing_problem()
    gpu = CudaDevice()
    side, notices = open_side(model, gpu, vram, tokens, fused=reason is None)
    if side is None:
        return None, notices
    if reason is not None:
        side.notices.append(
            f"no fused GPU kernels: {reason}; torch operations unpack the rows, which is slower"
        )
    side.notices += gpu.notices
    return side, side.notices


def fusing_problem() -> str | None:
    """Why the fused kernels cannot be used on the CUDA device, in words; None where they can."""
    try:
        from powerinfer_kernels.triton_launch import LEAST_CAPABILITY
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    major, minor = torch.cuda.get_device_capability(0)
    if (major, minor) >= LEAST_CAPABILITY:
        return None
    return f"compute capability {major}.{minor} is below {'.'.join(map(str, LEAST_CAPABILITY))}"


def open_side(
    model: Model, device: Device, vram: int | None, tokens: int, *, fused: bool
) -> tuple[TorchHotSide | None, list[str]]:
    """The hot side on ``device``, with the Triton kernels where ``fused`` and a row type has them; None where
    nothing is to be computed there, or its memory cannot be had in spite of all counting. Second, what must
    be said. Raises HardwareError for a budget beyond what is free."""
    split = model.split
    assert split is not None
    layers = [split.layer(index) for index in range(model.hyper.layers)]
    activation = (model.hyper.activation, model.hyper.activation_cut)
    limit, notices = _limit(device.free_bytes(), vram), list[str]()
    hot = fit(layers, limit, split.group, tokens)
    planned = sum(layer.hot_neurons for layer in layers)
    if limit is not None and vram is None and sum(hot) < planned:
        notices.append(
            f"{sum(hot)} of the plan's {planned} hot neurons fit in the {limit // _MIB} MiB of VRAM that can "
            "be used; the others are computed on the CPU"
        )
    size = hot_size(layers, hot, tokens)
    if not any(hot):
        device.close()
        return None, notices
    try:
        backend, kinds = _load(layers, hot, device, activation, tokens, fused=fused)
    except OutOfDeviceMemory as error:
        device.close()
        return None, [*notices, f"out of VRAM at the start: {error}; everything is computed on the CPU"]
    if kinds:
        notices.append(
            f"{', '.join(kinds)} rows have no fused GPU kernel; torch operations unpack them, which is slower"
        )
    spare = None
    if device.free_bytes() is not None:
        spare = partial(_spare, layers, hot, activation, tokens)
    return TorchHotSide(backend, spare, size.total, notices), notices


def _limit(free: int | None, vram: int | None) -> int | None:
    """Bytes for weights and scratch: of the budget asked for, or of what is free."""
    if free is None:
        return vram
    if vram is not None and vram > free:
        raise HardwareError(
            f"--vram {vram // _MIB} MiB: the GPU has {free // _MIB} MiB free; ask for less (the split point "
            "moves, nothing is reconverted), or leave --vram out to use what is free"
        )
    return max(0, (free - MARGIN if vram is None else vram) - OVERHEAD)


def _spare(layers: Sequence[SplitLayer], hot: Sequence[int], activation: Activation, tokens: int) -> Backend:
    return _load(layers, hot, CpuDevice(), activation, tokens, fused=False)[0]


def _load(
    layers: Sequence[SplitLayer], hot: Sequence[int], device: Device, activation: Activation, tokens: int,
    *, fused: bool,
) -> tuple[Backend, list[str]]:  # fmt: skip
    """Everything on the device, and the row types that were to be fused and cannot."""
    width = layers[0].width
    values = len(layers[0].kinds) * width * sum(hot)
    unpack = device.free_bytes() is None and 4 * values <= UNPACKED_LIMIT
    form = _Form(width, fused=fused, unpack=unpack)
    used = [(layer, count) for layer, count in zip(layers, hot, strict=True) if count]
    kinds = {RowType(layer.type_of(kind)) for layer, _ in used for kind in layer.kinds[:-1]}
    mixed = len({kind.is_float for kind in kinds}) > 1
    most, chunk = max(hot), min(CHUNK_ROWS, max(hot))
    floats = [tokens * width] * (2 + mixed)
    floats += [chunk * width, tokens * chunk, tokens * chunk, rest_floats(most, width)]
    pieces = [piece for layer, count in used for piece in form.pieces(layer, count)] + [4 * n for n in floats]
    form.memory = _Arena(device.allocate(sum(map(_aligned, pieces))))
    ffns = [
        form.ffn(layer, count, activation) if count else None
        for layer, count in zip(layers, hot, strict=True)
    ]
    out, first, *others = (form.memory.floats(n) for n in floats)
    inputs = [space.view(tokens, width) for space in (first, *others[: int(mixed)])]
    scratch = Scratch(others[mixed].view(chunk, width), *others[mixed + 1 :])
    staging = [device.staging(tokens, width) for _ in inputs]
    exchange = Exchange(
        Inputs(staging[0], staging[-1]), device.staging(tokens, width),
        Inputs(inputs[0], inputs[-1]), out.view(tokens, width),
    )  # fmt: skip
    rounded = not all(kind.is_float for kind in kinds)
    return Backend(device, ffns, exchange, scratch, rounded=rounded), sorted(form.not_fused)


def rest_floats(neurons: int, width: int) -> int:
    """Floats for the hidden values of a token, to whole lines, and partial sums of SPLIT_ROWS rows each."""
    return -(-neurons // 64) * 64 + -(-neurons // SPLIT_ROWS) * width


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class _Arena:
    """One block of device memory, given out piece by piece."""

    def __init__(self, memory: torch.Tensor) -> None:
        self._memory, self._used = memory, 0

    def take(self, nbytes: int) -> torch.Tensor:
        """uint8 (nbytes,)."""
        first = self._used
        self._used += _aligned(nbytes)
        assert self._used <= len(self._memory)
        return self._memory[first : first + nbytes]

    def floats(self, count: int) -> torch.Tensor:
        """float32 (count,)."""
        return self.take(4 * count).view(torch.float32)


@dataclass
class _Form:
    """How matrices are kept: planar for the fused kernels, unpacked, or as in the file."""

    width: int
    fused: bool
    unpack: bool
    memory: _Arena | None = None
    not_fused: set[str] = field(default_factory=set)

    def pieces(self, layer: SplitLayer, count: int) -> list[int]:
        """Bytes that the first ``count`` neurons of ``layer`` take of the arena, matrix by matrix."""
        rows = [] if self.unpack else [row_bytes(layer.type_of(kind), self.width) for kind in layer.kinds]
        return [count * nbytes for nbytes in rows] + ([] if layer.bias is None else [4 * count])

    def ffn(self, layer: SplitLayer, count: int, activation: Activation) -> HotFFN:
        """The first ``count`` neurons of ``layer``."""
        first, *factor, down = (self._rows(layer, kind, count) for kind in layer.kinds)
        bias = None
        if layer.bias is not None:
            assert self.memory is not None
            bias = self.memory.floats(count)
            bias.copy_(torch.from_numpy(layer.bias[:count].copy()))
        return HotFFN(first, factor[0] if factor else None, down, bias, count, activation)

    def _rows(self, layer: SplitLayer, kind: str, count: int) -> Rows:
        row_type = RowType(layer.type_of(kind))
        source = np.ascontiguousarray(layer.rows(kind, 0, count))
        if self.unpack:
            return UnpackedRows(row_type, dequantize(_tensor(source), row_type, self.width))
        assert self.memory is not None
        there = self.memory.take(source.size)
        if self.fused and row_type in PLANAR_TYPES:
            from powerinfer_kernels.triton_launch import PlanarRows

            there.copy_(_tensor(to_planar(source, row_type, self.width)))
            return FusedRows(PlanarRows(there, row_type, count, self.width))
        if self.fused:
            self.not_fused.add(row_type.name)
        there.copy_(_tensor(source.reshape(-1)))
        return FileRows(row_type, there.view(count, -1))


def _tensor(array: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> torch.Tensor:
    """A tensor of the same bytes; of a copy where they may not be written, which torch insists on."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())
