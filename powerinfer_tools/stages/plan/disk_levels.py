"""Levels whose experts, or dense FFN, are on disk alone, in part or as a whole: the third tier.

Of a layer's cold experts the busiest are in RAM; what a token takes of the others is read. By the profile it
takes f_i of expert i (its frequency), so the bytes read are Σ f_i · bytes over the experts on disk. Reads go
two layers ahead of need, and so beside all computing: a token takes as long as the slower of both.
"""

from dataclasses import fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from powerinfer_formats.modes import MODES
from powerinfer_kernels.units import PIECE_BYTES
from powerinfer_tools.engine.layers_on_disk import PASSING
from powerinfer_tools.engine.units_on_disk import READERS
from powerinfer_tools.model.matrices import MatrixShape
from powerinfer_tools.model.shapes import LayerShape, ModelShape
from powerinfer_tools.stages.plan.costs import Disk
from powerinfer_tools.stages.plan.ffn_units import FFNUnits
from powerinfer_tools.stages.plan.levels import LevelTable
from powerinfer_tools.stages.plan.memory import expert_bytes, experts_of

Integers = npt.NDArray[np.int64]
Arrays = dict[str, Any]
DISK_UNKNOWN = (
    "What does not fit can be read from disk; how fast is not known here: measure with powerinfer doctor "
    "--measure -m MODEL, and plan again"
)
#: Numbers of experts in RAM that are tried, beside all: these parts of the cold ones.
STEPS = 32
#: With an accelerator, every so many of the levels have experts on disk, too.
_HOT_STEP = 8


def with_disk(
    table: LevelTable,
    layer: LayerShape,
    units: FFNUnits,
    frequencies: npt.NDArray[np.float64],
    disk: Disk,
    passes: int = 0,
) -> LevelTable:
    """The levels of ``table``, and each (of many, every eighth) with parts of its cold experts on ``disk``
    alone; ``frequencies`` of the layer's experts, descending. A dense FFN is there as a whole or not. A
    prompt of ``passes`` batches reads all of them in each."""
    if layer.experts is None:
        return _with_ffn_on_disk(table, layer, units, disk, passes)
    levels, resident = _grid(table, layer)
    each, hot = expert_bytes(layer), table.hot[levels] // layer.up.rows
    active = np.concatenate([np.zeros(1), np.cumsum(frequencies)])
    missed = active[-1] - active[hot + resident]
    more = _levels_of(table, levels)
    absent = (len(frequencies) - hot - resident) * each.ram
    more["ram"] = more["ram"] - absent
    more["disk"] = absent
    more["disk_seconds"] = missed * seconds_of(layer, disk)
    reading = passes * absent / each.ram * seconds_of(layer, disk)
    more["prompt_seconds"] = np.maximum(more["prompt_seconds"], reading)
    return _joined(table, more)


def _with_ffn_on_disk(
    table: LevelTable, layer: LayerShape, units: FFNUnits, disk: Disk, passes: int
) -> LevelTable:
    """The level of the source's own form on the CPU, once more with the FFN on disk."""
    plain = (table.hot == 0) & (table.block_hot == 0) & (table.mode == MODES.index("dense"))
    levels = np.flatnonzero(plain & (table.predictor_hot == 0))[:1]
    if not len(levels):
        return table
    more, absent = _levels_of(table, levels), units.whole.ram
    reading = seconds_of(layer, disk)
    more["disk"] = np.full(1, absent)
    more["ram"] = more["ram"] - absent
    more["disk_seconds"] = np.full(1, reading)
    more["prompt_seconds"] = np.maximum(more["prompt_seconds"], passes * reading)
    return _joined(table, more)


def _levels_of(table: LevelTable, levels: Integers) -> Arrays:
    names = (field.name for field in fields(LevelTable) if field.name not in ("unit", "total_activations"))
    return {name: getattr(table, name)[levels] for name in names}


def _joined(table: LevelTable, more: Arrays) -> LevelTable:
    joined = {name: np.concatenate([getattr(table, name), values]) for name, values in more.items()}
    return replace(table, **joined)  # type: ignore[arg-type]  # the fields that hold arrays


def _grid(table: LevelTable, layer: LayerShape) -> tuple[Integers, Integers]:
    """Levels of the table, and numbers of cold experts in RAM for each, less than all of them."""
    count = experts_of(layer).count
    first = np.arange(0, len(table), _HOT_STEP if table.counts > 1 else 1)
    levels, resident = list[int](), list[int]()
    for level in first:
        cold = count - int(table.hot[level]) // layer.up.rows
        for kept in sorted({cold * step // STEPS for step in range(STEPS)} - {cold}):
            levels.append(int(level))
            resident.append(kept)
    return np.array(levels, dtype=np.int64), np.array(resident, dtype=np.int64)


def seconds_of(layer: LayerShape, disk: Disk) -> float:
    """Reading one expert of ``layer``, in pieces as the engine reads it."""
    return sum(matrix.nbytes / disk.bandwidth(_piece(matrix)) for matrix in layer.ffn)


def buffer_bytes(shape: ModelShape) -> int:
    """RAM that reading takes: buffers of the readers, and slots for the experts of two tokens of a layer, or
    for FFNs that pass through."""
    layers = [layer for layer in shape.layers if layer.routed] if shape.routed else shape.layers
    widest = max(2 * _piece(matrix) for layer in layers for matrix in layer.ffn)
    return READERS * widest + max(_passing(layer) for layer in layers)


def _passing(layer: LayerShape) -> int:
    if layer.experts is None:
        return PASSING * sum(matrix.packed_nbytes for matrix in layer.ffn)
    return 2 * layer.experts.used * expert_bytes(layer).ram


NO_LOCALITY = "A dense model has no locality that a disk could use: every token takes all of its weights."


def _piece(matrix: MatrixShape) -> int:
    return min(PIECE_BYTES, matrix.nbytes)
