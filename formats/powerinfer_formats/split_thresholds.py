"""The thresholds in a split file: the factor by which neurons are selected, and the cost in quality."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from powerinfer_formats import errors
from powerinfer_formats.block_types import TensorType
from powerinfer_formats.gguf_layout import ValueType
from powerinfer_formats.gguf_reader import StringArray
from powerinfer_formats.gguf_writer import GGUFWriter
from powerinfer_formats.model_source import ModelSource

KEY_FACTORS = "powerinfer.threshold_factors"
KEY_COST = "powerinfer.threshold_cost"
FACTORS = ("none", "gate", "up")


@dataclass(frozen=True)
class SplitThresholding:
    """What a split file says of its thresholds: for each layer the factor that is compared, or none; and what
    mode thresholded costs, measured when they were chosen: perplexity without and with, the standard error of
    their ratio, Kullback-Leibler divergence in nats a token, and the relative increase that was allowed."""

    factors: tuple[str, ...]
    cost: tuple[float, float, float, float, float]

    @property
    def increase(self) -> float:
        """The relative increase of perplexity that was measured."""
        return self.cost[1] / self.cost[0] - 1

    def write(self, writer: GGUFWriter) -> None:
        """Add the keys."""
        writer.add(KEY_FACTORS, self.factors, ValueType.STRING)
        writer.add(KEY_COST, self.cost, ValueType.FLOAT32)


@dataclass(frozen=True, eq=False)
class SplitThreshold:
    """Neurons are computed where the size of ``factor``, act(gate) or up, is above ``values``, float32
    [neurons], by position."""

    factor: str
    values: NDArray[np.float32]


def threshold_name(layer: int) -> str:
    """F32 [neurons]: thresholds of the sizes of a factor."""
    return f"blk.{layer}.ffn_threshold"


def read_thresholding(gguf: ModelSource, layers: int) -> SplitThresholding | None:
    """The thresholding in the header; None if there is none. Raises ``FormatError``."""
    if KEY_FACTORS not in gguf.metadata:
        if KEY_COST in gguf.metadata:
            raise errors.BadValue(gguf.path, f"metadata {KEY_COST!r} is there, but no threshold is")
        return None
    factors = tuple(gguf.get(KEY_FACTORS, StringArray))
    if len(factors) != layers or not set(factors) <= set(FACTORS):
        raise errors.BadValue(
            gguf.path,
            f"metadata {KEY_FACTORS!r} must have one of {', '.join(FACTORS)} for each of {layers} layers",
        )
    cost = gguf.get(KEY_COST, np.ndarray)
    if cost.dtype != np.float32:
        raise errors.WrongKeyType(gguf.path, f"metadata {KEY_COST!r} has {cost.dtype} values, not FLOAT32")
    if cost.shape != (5,) or not np.isfinite(cost).all() or cost.min() < 0 or cost[:2].min() < 1:
        raise errors.BadValue(
            gguf.path, f"metadata {KEY_COST!r} must have five values: two perplexities, and three from 0 on"
        )
    first, second, error, kl, budget = cost.tolist()
    return SplitThresholding(factors, (first, second, error, kl, budget))


def read_threshold(gguf: ModelSource, layer: int, factor: str, neurons: int) -> SplitThreshold | None:
    """The thresholds of one layer, None for factor none; raises ``FormatError``."""
    name = threshold_name(layer)
    if factor == "none":
        if name in gguf.tensors:
            raise errors.UnexpectedTensor(
                gguf.path, f"has a tensor {name!r}, which must not be there: the layer has no thresholds"
            )
        return None
    values = gguf.tensor(name, shape=(neurons,), types={TensorType.F32}).view("<f4")
    if not np.isfinite(values).all():
        raise errors.BadValue(gguf.path, f"tensor {name!r} has values that are not finite")
    return SplitThreshold(factor, values)
