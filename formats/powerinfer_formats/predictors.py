"""Predictors of which neurons will be active: two small matrices and thresholds for every layer."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

from powerinfer_formats import errors
from powerinfer_formats.block_types import BLOCK_SHAPES, TensorType
from powerinfer_formats.records import RecordReader, dump_json, parse_json
from powerinfer_formats.safetensors_file import open_safetensors, write_safetensors

FORMAT, VERSION = "powerinfer-predictors", 1
Floats = NDArray[np.float32]
#: Types that the matrices can have in a split file.
RowTypeName = Literal["Q8_0", "Q4_0", "F16", "F32"]


@dataclass(frozen=True)
class Quality:
    """What a predictor reached on tokens that it was not made from. ``density`` is the true share of active
    neurons, ``predicted_density`` the predicted one, ``recall`` the share of active neurons that were
    predicted, ``precision`` that of predicted ones that are active."""

    density: float
    predicted_density: float
    recall: float
    precision: float


@dataclass(frozen=True)
class PredictorsHeader:
    """What the predictors are of, how they were made, and how good each layer's is."""

    fingerprint: str
    model_name: str
    method: str
    row_type: RowTypeName
    target_recall: float
    width: int
    neurons: int
    ranks: tuple[int, ...]
    test_records: int
    quality: tuple[Quality, ...]
    corpus_hashes: tuple[str, ...]
    tool_version: str


@dataclass(frozen=True, eq=False)
class LayerPredictor:
    """Neuron *i* is predicted where (outward · (inward · x))ᵢ > thresholdᵢ: ``inward`` (rank, width),
    ``outward`` (neurons, rank), ``threshold`` (neurons); neurons in the model's own order."""

    inward: Floats
    outward: Floats
    threshold: Floats


@dataclass(frozen=True, eq=False)
class Predictors:
    """The predictors of all layers."""

    header: PredictorsHeader
    layers: tuple[LayerPredictor, ...] = field(repr=False)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read and check ``path``; raises ``FormatError``."""
        where = Path(path)
        with open_safetensors(where) as reader:
            document = parse_json(reader.document(), where)
            if not isinstance(document, dict) or document.pop("format", None) != FORMAT:
                raise errors.BadMagic(where, "does not hold predictors")
            version = document.pop("version", None)
            if version != VERSION:
                raise errors.UnsupportedVersion(where, f"is of version {version}, expected {VERSION}")
            header = RecordReader(where).read(PredictorsHeader, document)
            _check(header, where)
            layers = []
            for index, rank in enumerate(header.ranks):
                shapes = {"in": (rank, header.width), "out": (header.neurons, rank)}
                shapes["threshold"] = (header.neurons,)  # type: ignore[assignment]
                layer = LayerPredictor(
                    *(reader.take(_name(index, kind), "F32", shape) for kind, shape in shapes.items())
                )
                if not all(np.isfinite(array).all() for array in vars(layer).values()):
                    raise errors.BadValue(
                        where, f"the predictor of layer {index} has values that are not finite"
                    )
                layers.append(layer)
            reader.finish()
        return cls(header, tuple(layers))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``path`` atomically."""
        tensors = {
            _name(index, kind): np.ascontiguousarray(array, np.float32)
            for index, layer in enumerate(self.layers)
            for kind, array in (("in", layer.inward), ("out", layer.outward), ("threshold", layer.threshold))
        }
        document = {"format": FORMAT, "version": VERSION, **vars(self.header)}
        write_safetensors(path, dump_json(document, indent=None), tensors)

    def require_model(
        self, fingerprint: str, name: str, shape: tuple[int, int, int], file: str | os.PathLike[str]
    ) -> None:
        """Raise ``OtherModel``, with both names, unless these are of this very model; ``shape`` is its number
        of layers, width and neurons."""
        header = self.header
        own = (len(header.ranks), header.width, header.neurons)
        if header.fingerprint != fingerprint or shape != own:
            raise errors.OtherModel(
                file, f"was made for the model {self.header.model_name!r}, not for {name!r}; train again"
            )


def _name(layer: int, kind: str) -> str:
    return f"blk.{layer}.predictor_{kind}"


def _check(header: PredictorsHeader, file: Path) -> None:
    def require(condition: bool, problem: str) -> None:
        if not condition:
            raise errors.BadField(file, problem)

    for name in ("width", "neurons"):
        require(1 <= getattr(header, name) <= 1 << 24, f"{name} is {getattr(header, name)}")
    require(1 <= len(header.ranks) <= 4096, f"ranks are of {len(header.ranks)} layers, expected 1 to 4096")
    require(len(header.quality) == len(header.ranks), "quality and ranks are of different layers")
    require(all(1 <= rank <= header.width for rank in header.ranks), "a rank is not from 1 to width")
    block = BLOCK_SHAPES[TensorType[header.row_type]].values
    whole = all(size % block == 0 for size in (header.width, *header.ranks))
    require(whole, f"width and ranks are not whole blocks of {header.row_type}")
    require(header.test_records >= 1, "test_records is not positive")
    for index, quality in enumerate(header.quality):
        for name, value in vars(quality).items():
            require(0 <= value <= 1, f"quality[{index}].{name} is {value}, expected 0 to 1")
