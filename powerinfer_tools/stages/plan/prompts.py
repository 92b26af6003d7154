"""Time of a request: a prompt, then tokens one by one.

A prompt is processed in batches. A matrix is read once a batch, and multiplied with every token of it, so its
time is the longer of bytes over bandwidth and of multiply-adds over the rate of batches:

    t = max(passes · bytes / BW, tokens · multiply-adds / rate)

All neurons are computed then, whatever the mode; of experts those that tokens take, which in a batch of
hundreds are nearly all. Both sides work at once. What is placed well for single tokens may be placed badly
for prompts: a hand-over carries every token of the batch.

Rates of batches are not measured with the hardware profile. On the CPU one core of this project's machines
made 5·10¹⁰ multiply-adds a second (a prompt of SmolLM2-135M, docs/LOG.md); an accelerator is taken to make
ten for each byte of its bandwidth.
"""

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from powerinfer_formats.modes import MODES
from powerinfer_tools.model.matrices import MatrixShape
from powerinfer_tools.model.shapes import LayerShape, ModelShape
from powerinfer_tools.stages.plan.costs import Machine
from powerinfer_tools.stages.plan.ffn_units import FFNUnits
from powerinfer_tools.stages.plan.levels import LevelTable
from powerinfer_tools.stages.plan.memory import RequestSize, attention_bytes, gpu_attention_bytes

Vector = npt.NDArray[np.float64]
CPU_MACS_PER_CORE = 5e10
GPU_MACS_PER_BYTE = 10.0
_F32 = 4
#: How fast the CPU computes a prompt where it could leave out neurons of experts, of its rate for whole ones:
#: nearly all are active for some token (docs/LOG.md, 2026-11-30).
_PICKED_PROMPT_RATE = 0.85


def with_prompt(
    table: LevelTable,
    shape: ModelShape,
    layer: LayerShape,
    units: FFNUnits,
    machine: Machine,
    size: RequestSize,
) -> LevelTable:
    """``table`` of a layer with the time that it takes of the prompt."""
    if not size.prompt:
        return table
    gpu = machine.gpu
    hot = _ffn_seconds(table, layer, units, machine, size, on_gpu=True)
    cold = _ffn_seconds(table, layer, units, machine, size, on_gpu=False)
    block = np.where(
        table.block_hot > 0,
        0.0 if gpu is None else _block_seconds(shape, layer, machine, size, on_gpu=True),
        _block_seconds(shape, layer, machine, size, on_gpu=False),
    )
    seconds = block + np.maximum(hot, cold)
    if gpu is not None:
        carried = 2 * _F32 * layer.width * size.prompt / gpu.link_bandwidth
        waits = size.passes * (gpu.sync_seconds + 2 * gpu.link_latency) + carried
        seconds = seconds + np.where(table.sync_seconds > 0, waits, 0.0)
    return replace(table, prompt_seconds=seconds)


def _ffn_seconds(
    table: LevelTable,
    layer: LayerShape,
    units: FFNUnits,
    machine: Machine,
    size: RequestSize,
    *,
    on_gpu: bool,
) -> Vector:
    """What one side computes of the FFN, where the layer has one."""
    if not units.count:
        return np.zeros(len(table.hot))
    hot, shared = table.hot / (units.count * units.neurons), table.shared_hot.astype(np.float64)
    total = table.total_activations - units.shared_neurons
    taken = (
        (table.activations - shared * units.shared_neurons) / total if layer.experts and total > 0 else hot
    )
    nbytes = units.each.vram if on_gpu else units.each.ram
    others = units.shared.vram if on_gpu else units.shared.ram
    share, work, also = (hot, taken, shared) if on_gpu else (1 - hot, 1 - taken, 1 - shared)
    # Of the units of a batch, as many as its tokens can take.
    reached = min(1.0, size.batch * units.taken / units.count)
    read = share * units.count * reached * nbytes + also * others
    each = np.full(len(hot), float(_macs(layer.ffn) * (units.taken if layer.experts else 1)))
    if layer.routed and not on_gpu:
        each /= np.where(table.mode == MODES.index("gate-first"), _PICKED_PROMPT_RATE, 1.0)
    macs = work * each + also * (_macs(layer.experts.shared) if layer.experts else 0)
    return _longer(read, macs, machine, size, on_gpu=on_gpu)


def _block_seconds(
    shape: ModelShape, layer: LayerShape, machine: Machine, size: RequestSize, *, on_gpu: bool
) -> float:
    """Attention: its matrices, and every token with those before it."""
    nbytes = gpu_attention_bytes(layer) if on_gpu else attention_bytes(layer)
    macs = _macs(layer.attention) + shape.heads * shape.head_dim * (layer.window or size.prompt)
    return float(_longer(np.array([float(nbytes)]), np.array([float(macs)]), machine, size, on_gpu=on_gpu)[0])


def _longer(nbytes: Vector, macs: Vector, machine: Machine, size: RequestSize, *, on_gpu: bool) -> Vector:
    if on_gpu:
        if machine.gpu is None:
            return np.zeros(len(nbytes))
        bandwidth, rate = machine.gpu.bandwidth, GPU_MACS_PER_BYTE * machine.gpu.bandwidth
    else:
        bandwidth, rate = machine.bandwidth, CPU_MACS_PER_CORE * machine.cores
    return np.maximum(size.passes * nbytes / bandwidth, size.prompt * macs / rate)


def _macs(matrices: tuple[MatrixShape, ...]) -> int:
    return sum(matrix.rows * matrix.columns for matrix in matrices)
