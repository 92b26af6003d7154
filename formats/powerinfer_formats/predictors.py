"""Predictors of which neurons will be active, layer by layer, with what they reach and what they cost."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray

from powerinfer_formats import errors
from powerinfer_formats.block_types import BLOCK_SHAPES, TensorType
from powerinfer_formats.records import dump_header, read_header
from powerinfer_formats.safetensors_file import SafetensorsReader, open_safetensors, write_safetensors

FORMAT, VERSION = "powerinfer-predictors", 2
Floats = NDArray[np.float32]
_Tensor = tuple[str, tuple[int, ...]]
#: Types that the matrices can have in a split file.
RowTypeName = Literal["Q8_0", "Q4_0", "F16", "F32"]
#: The kinds of a layer's predictor; ``none``: the layer's neurons are not predicted.
Kind = Literal["none", "low-rank", "residual-relu", "sign"]


@dataclass(frozen=True)
class Quality:
    """A predictor's quality on tokens from which it was not made. ``density`` is the true share of active
    neurons, ``predicted_density`` the predicted share, ``recall`` the share of active neurons that were
    predicted, ``precision`` the share of predicted neurons that are active."""

    density: float
    predicted_density: float
    recall: float
    precision: float


@dataclass(frozen=True)
class PredictorInfo:
    """One layer's predictor: its kind, its rank (0 where the kind has none), the bytes that a token reads of
    it, and its quality (None: not measured).

    A layer of kind ``none`` is to be computed gate-first, which names exactly the active neurons; any other
    may be computed in mode predicted within the quality that was asked for.
    """

    kind: Kind
    rank: int
    nbytes: int
    quality: Quality | None


@dataclass(frozen=True)
class PredictionCost:
    """The cost of predicting in quality, measured with the engine: perplexity of the model as it is, and with
    predictors in every layer that has one, over the same tokens of the text with this hash, and the mean
    Kullback-Leibler divergence between the two, in nats a token.

    ``max_increase`` is the relative increase of perplexity that was asked for, None if recall was asked for.
    """

    max_increase: float | None
    perplexity: float
    predicted_perplexity: float
    divergence: float
    tokens: int
    window: int
    text_sha256: str

    @property
    def increase(self) -> float:
        """Relative increase of perplexity."""
        return self.predicted_perplexity / self.perplexity - 1


@dataclass(frozen=True)
class PredictorsHeader:
    """The predictors' model, how they were made, how good each layer's predictor is, and their cost.

    ``target_recall`` is None if recall was chosen layer by layer, or not at all. ``cost`` is None if no text
    was given to measure it on. ``test_records`` is 0 if nothing was measured.
    """

    fingerprint: str
    model_name: str
    method: str
    row_type: RowTypeName
    target_recall: float | None
    width: int
    neurons: int
    layers: tuple[PredictorInfo, ...]
    test_records: int
    cost: PredictionCost | None
    corpus_hashes: tuple[str, ...]
    tool_version: str

    @property
    def nbytes(self) -> int:
        """Bytes of all predictors in a split file."""
        return sum(layer.nbytes for layer in self.layers)


@dataclass(frozen=True, eq=False)
class LowRank:
    """Neuron *i* is predicted where (outward · (inward · x))ᵢ > thresholdᵢ: ``inward`` (rank, width),
    ``outward`` (neurons, rank), ``threshold`` (neurons); neurons in the model's own order."""

    kind: ClassVar[Kind] = "low-rank"
    inward: Floats
    outward: Floats
    threshold: Floats

    @staticmethod
    def tensors(header: PredictorsHeader, rank: int) -> dict[str, _Tensor]:
        """Type and shape of each tensor, by the ending of its name, in the order of the fields."""
        return {
            "in": ("F32", (rank, header.width)),
            "out": ("F32", (header.neurons, rank)),
            "threshold": ("F32", (header.neurons,)),
        }


class ResidualRelu(LowRank):
    """Neuron *i* is predicted where (outward · relu(inward · h))ᵢ > thresholdᵢ, with h the residual stream
    that the FFN's norm reads (in a parallel block, the layer's input): the original PowerInfer's kind."""

    kind: ClassVar[Kind] = "residual-relu"


@dataclass(frozen=True, eq=False)
class SignBits:
    """Neuron *i* is predicted where step · Σⱼ sᵢⱼ · qⱼ > thresholdᵢ: x ≈ step · q with q of four bits and a
    sign, sᵢⱼ = −1 where bit j % 8 of byte j // 8 of ``signs`` (neurons, ceil(width / 8)) is 1, else 1."""

    kind: ClassVar[Kind] = "sign"
    signs: NDArray[np.uint8]
    threshold: Floats

    @staticmethod
    def tensors(header: PredictorsHeader, rank: int) -> dict[str, _Tensor]:
        """Type and shape of each tensor, by the ending of its name, in the order of the fields."""
        return {
            "signs": ("U8", (header.neurons, -(-header.width // 8))),
            "threshold": ("F32", (header.neurons,)),
        }


#: A predictor of any kind; None for a layer without.
LayerPredictor = LowRank | SignBits | None
_KINDS: dict[str, type[LowRank | SignBits]] = {made.kind: made for made in (LowRank, ResidualRelu, SignBits)}


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
            header = read_header(
                PredictorsHeader, reader.document(), where, (FORMAT, VERSION), "predictors", "; train again"
            )
            _check(header, where)
            layers = tuple(_take(reader, header, index) for index in range(len(header.layers)))
            reader.finish()
        return cls(header, layers)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``path`` atomically."""
        tensors = {}
        for index, layer in enumerate(self.layers):
            for name, array in _parts(self.header, layer):
                tensors[_name(index, name)] = np.ascontiguousarray(array)
        write_safetensors(path, dump_header(self.header, (FORMAT, VERSION)), tensors)

    def require_model(
        self, fingerprint: str, name: str, shape: tuple[int, int, int], file: str | os.PathLike[str]
    ) -> None:
        """Raise ``OtherModel``, with both names, unless these are of this very model; ``shape`` is its number
        of layers, width and neurons."""
        header = self.header
        own = (len(header.layers), header.width, header.neurons)
        if header.fingerprint != fingerprint or shape != own:
            raise errors.OtherModel(
                file, f"was made for the model {self.header.model_name!r}, not for {name!r}; train again"
            )


def _parts(header: PredictorsHeader, layer: LayerPredictor) -> Iterator[tuple[str, NDArray[Any]]]:
    """Endings of names of tensors with their content."""
    if layer is not None:
        for part, ending in zip(fields(layer), layer.tensors(header, 1), strict=True):
            yield ending, getattr(layer, part.name)


def _take(reader: SafetensorsReader, header: PredictorsHeader, index: int) -> LayerPredictor:
    info = header.layers[index]
    if info.kind == "none":
        return None
    cls = _KINDS[info.kind]
    arrays = [
        reader.take(_name(index, name), *tensor) for name, tensor in cls.tensors(header, info.rank).items()
    ]
    if not all(np.isfinite(array).all() for array in arrays):
        raise errors.BadValue(reader.path, f"the predictor of layer {index} has values that are not finite")
    return cls(*arrays)


def _name(layer: int, kind: str) -> str:
    return f"blk.{layer}.predictor_{kind}"


def _check(header: PredictorsHeader, file: Path) -> None:
    def require(condition: bool, problem: str) -> None:
        if not condition:
            raise errors.BadField(file, problem)

    for name in ("width", "neurons"):
        require(1 <= getattr(header, name) <= 1 << 24, f"{name} is {getattr(header, name)}")
    require(1 <= len(header.layers) <= 4096, f"layers are {len(header.layers)}, expected 1 to 4096")
    require(header.test_records >= 0, "test_records is negative")
    block = BLOCK_SHAPES[TensorType[header.row_type]].values
    widest = {"low-rank": header.width, "residual-relu": max(header.width, header.neurons)}
    for index, layer in enumerate(header.layers):
        where = f"layers[{index}]"
        require(0 <= layer.nbytes < 1 << 63, f"{where}.nbytes is {layer.nbytes}")
        if layer.kind in widest:
            most = widest[layer.kind]
            require(1 <= layer.rank <= most, f"{where}.rank is {layer.rank}, not from 1 to {most}")
            whole = layer.rank % block == 0 and header.width % block == 0
            require(whole, f"{where}: width and rank are not whole blocks of {header.row_type}")
        else:
            require(layer.rank == 0, f"{where}.rank is {layer.rank}, and the kind {layer.kind} has none")
        measured = layer.quality is not None
        require(measured == (header.test_records > 0), f"{where}.quality contradicts test_records")
        for name, value in vars(layer.quality).items() if layer.quality else ():
            require(0 <= value <= 1, f"{where}.quality.{name} is {value}, expected 0 to 1")
    if header.cost is not None:
        for name in ("perplexity", "predicted_perplexity", "tokens", "window"):
            require(getattr(header.cost, name) > 0, f"cost.{name} is not positive")
