"""Models of the original PowerInfer, laid out by hand from the tensors of a tiny model."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, quants
from numpy.typing import NDArray

from powerinfer_formats.gguf_layout import ValueType
from powerinfer_formats.gguf_reader import GGUFFile
from powerinfer_formats.gguf_writer import GGUFWriter
from powerinfer_kernels import RowType
from powerinfer_tools.model.loading import load_model
from powerinfer_tools.model.split_rows import transposed_down

Floats = NDArray[np.float32]
#: Type, shape and data by name.
Tensors = dict[str, tuple[int, tuple[int, ...], bytes]]
#: fc1 and fc2 of a layer from its number, width, neurons and rank.
Predictor = Callable[[int, int, int, int], tuple[Floats, Floats]]


def random_predictor(layer: int, width: int, neurons: int, rank: int) -> tuple[Floats, Floats]:
    rng = np.random.default_rng(100 + layer)
    inward = rng.normal(size=(rank, width)).astype(np.float32)
    return inward, rng.normal(size=(neurons, rank)).astype(np.float32)


def stored(rows: Floats, row_type: RowType) -> NDArray[np.uint8]:
    """``rows`` in any type, also those that only the gguf package writes."""
    kind = GGMLQuantizationType(int(row_type))
    return np.asarray(quants.quantize(rows, kind)).view(np.uint8).reshape(len(rows), -1)


@dataclass(frozen=True)
class OriginalLayout:
    """How to write one: types of the down rows and of the predictor, its rank and its threshold."""

    down_type: RowType = RowType.F32
    predictor_type: RowType = RowType.F32
    rank: int = 32
    threshold: float | None = 0.5
    predictor: Predictor = random_predictor


def write_original(source: Path, path: Path, how: OriginalLayout) -> Path:
    """The source model as the original's converter lays it out: ``ffn_down_t`` for ``ffn_down``, a predictor
    for each layer, the magic, and no word of the activation."""
    model = load_model(source)
    hyper = model.hyper
    tensors: dict[str, tuple[int, tuple[int, ...], NDArray[np.uint8]]] = {}
    for name, info in model.source.tensors.items():
        tensors[name.replace("ffn_down.bias", "ffn_down_t.bias")] = (
            info.row_type,
            info.shape,
            model.source.tensor(name),
        )
    for index, layer in enumerate(model.layers):
        del tensors[f"blk.{index}.ffn_down.weight"]
        shape = (hyper.neurons, hyper.width)
        down = stored(transposed_down(layer.source_ffn), how.down_type)
        tensors[f"blk.{index}.ffn_down_t.weight"] = (int(how.down_type), shape, down)
        for name, rows in zip(
            ("fc1", "fc2"), how.predictor(index, hyper.width, hyper.neurons, how.rank), strict=True
        ):
            tensors[f"blk.{index}.{name}.weight"] = (
                int(how.predictor_type),
                rows.shape,
                stored(rows, how.predictor_type),
            )
    if "output.weight" not in tensors:
        tensors["output.weight"] = tensors["token_embd.weight"]
    with GGUFWriter(path, magic=b"PWRI") as writer:
        writer.copy_metadata(model.source, without=("powerinfer.activation",))
        if how.threshold is not None:
            writer.add("powerinfer.sparse_threshold", how.threshold, ValueType.FLOAT32)
        for name, (row_type, shape, _) in tensors.items():
            writer.declare(name, row_type, shape)
        for name, (_, _, data) in tensors.items():
            writer.write(name, data)
    model.close()
    return path


def rewrite(path: Path, target: Path, change: Callable[[Tensors], None]) -> Path:
    """A copy of the original model at ``path`` after ``change`` of its tensors (type, shape, data)."""
    with GGUFFile.open(path, magics=(b"PWRI",)) as source:
        tensors = {
            name: (info.row_type, info.shape, source.tensor(name).tobytes())
            for name, info in source.tensors.items()
        }
        change(tensors)
        with GGUFWriter(target, magic=b"PWRI") as writer:
            writer.copy_metadata(source)
            for name, (row_type, shape, _) in tensors.items():
                writer.declare(name, row_type, shape)
            for name, (_, _, data) in tensors.items():
                writer.write(name, data)
    return target
