"""Levels whose experts are in part on disk alone: the third tier.

Of a layer's cold experts the busiest are in RAM; what a token takes of the others is read. By the profile it
takes f_i of expert i (its frequency), so the bytes read are Σ f_i · bytes over the experts on disk. Reads go
two layers ahead of need, and so beside all computing: a token takes as long as the slower of both.
"""

from dataclasses import fields, replace

import numpy as np
import numpy.typing as npt

from powerinfer_kernels.units import PIECE_BYTES
from powerinfer_tools.engine.residency import READERS
from powerinfer_tools.model.matrices import MatrixShape
from powerinfer_tools.model.shapes import LayerShape, ModelShape
from powerinfer_tools.stages.plan.costs import Disk
from powerinfer_tools.stages.plan.levels import LevelTable
from powerinfer_tools.stages.plan.memory import expert_bytes, experts_of

Integers = npt.NDArray[np.int64]
GIB = 1 << 30
DISK_UNKNOWN = (
    "Experts can be read from disk; how fast is not known here: measure with powerinfer doctor --measure -m "
    "MODEL, and plan again"
)
#: Numbers of experts in RAM that are tried, beside all: these parts of the cold ones.
STEPS = 32
#: With an accelerator, every so many of the levels have experts on disk, too.
_HOT_STEP = 8


def with_disk(
    table: LevelTable, layer: LayerShape, frequencies: npt.NDArray[np.float64], disk: Disk
) -> LevelTable:
    """The levels of ``table``, and each (of many, every eighth) with parts of its cold experts on ``disk``
    alone; ``frequencies`` of the layer's experts, descending."""
    levels, resident = _grid(table, layer)
    each, hot = expert_bytes(layer), table.hot[levels] // layer.up.rows
    active = np.concatenate([np.zeros(1), np.cumsum(frequencies)])
    missed = active[-1] - active[hot + resident]
    more = {
        field.name: getattr(table, field.name)[levels]
        for field in fields(LevelTable)
        if field.name not in ("unit", "total_activations")
    }
    absent = (len(frequencies) - hot - resident) * each.ram
    more["ram"] = more["ram"] - absent
    more["disk"] = absent
    more["disk_seconds"] = missed * seconds_of(layer, disk)
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
    """RAM that reading takes: buffers of the readers, and slots for the experts of two tokens of a layer."""
    widest = max(2 * _piece(matrix) for layer in shape.expert_layers for matrix in layer.ffn)
    passing = max(2 * experts_of(layer).used * expert_bytes(layer).ram for layer in shape.expert_layers)
    return READERS * widest + passing


def no_locality(shape: ModelShape, disk: Disk) -> str:
    """What reading a dense model from disk would come to, in words."""
    nbytes = sum(matrix.nbytes for layer in shape.layers for matrix in layer.ffn)
    rate = disk.bandwidth(PIECE_BYTES)
    return (
        "A dense model has no locality that a disk could use: every token takes all of its weights. Reading "
        f"the {nbytes / GIB:.1f} GiB of its FFNs at {rate / 1e9:.2f} GB/s allows {rate / nbytes:.2g} tok/s "
        "at most, and is not done"
    )


def _piece(matrix: MatrixShape) -> int:
    return min(PIECE_BYTES, matrix.nbytes)
