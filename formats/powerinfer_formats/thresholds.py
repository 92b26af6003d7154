"""Thresholds: which neurons of a smooth activation may be left out, and the cost of leaving them out."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

from powerinfer_formats import errors
from powerinfer_formats.records import dump_header, read_header
from powerinfer_formats.safetensors_file import open_safetensors, write_safetensors

FORMAT, VERSION = "powerinfer-thresholds", 1
Floats = NDArray[np.float32]
#: The factor of act(gate)·up that is computed first and compared with the threshold; none: a dense layer.
Factor = Literal["none", "gate", "up"]


@dataclass(frozen=True)
class ThresholdCost:
    """The cost of leaving neurons out, on text that was not used for the choice: ``dense_perplexity`` and
    ``perplexity`` without and with thresholds, ``ratio_error`` the standard error of their ratio (of paired
    differences), ``kl`` the mean Kullback-Leibler divergence from dense in nats a token, ``tokens`` how many
    were scored."""

    dense_perplexity: float
    perplexity: float
    ratio_error: float
    kl: float
    tokens: int


@dataclass(frozen=True)
class ThresholdsHeader:
    """What the thresholds are of, and how they were chosen: ``max_increase`` is the relative increase of
    perplexity that was allowed; ``densities`` the share of neurons computed in each layer;
    ``uniform_density`` the one that equal densities in all layers would need for the same budget."""

    fingerprint: str
    model_name: str
    activation: str
    neurons: int
    max_increase: float
    factors: tuple[Factor, ...]
    densities: tuple[float, ...]
    uniform_density: float
    cost: ThresholdCost
    text_sha256: str
    tool_version: str


@dataclass(frozen=True, eq=False)
class Thresholds:
    """``layers[i]`` float32 (neurons), neurons in the model's own order: a neuron of layer *i* is computed
    where the size of its factor is above; None for a dense layer."""

    header: ThresholdsHeader
    layers: tuple[Floats | None, ...] = field(repr=False)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read and check ``path``; raises ``FormatError``."""
        where = Path(path)
        with open_safetensors(where) as reader:
            header = read_header(ThresholdsHeader, reader.document(), where, (FORMAT, VERSION), "thresholds")
            _check(header, where)
            layers: list[Floats | None] = []
            for index, factor in enumerate(header.factors):
                if factor == "none":
                    layers.append(None)
                    continue
                values = reader.take(_name(index), "F32", (header.neurons,))
                if not np.isfinite(values).all():
                    raise errors.BadValue(where, f"tensor {_name(index)!r} has values that are not finite")
                layers.append(values)
            reader.finish()
        return cls(header, tuple(layers))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``path`` atomically."""
        tensors = {
            _name(index): np.ascontiguousarray(values, np.float32)
            for index, values in enumerate(self.layers)
            if values is not None
        }
        write_safetensors(path, dump_header(self.header, (FORMAT, VERSION)), tensors)

    def require_model(
        self, fingerprint: str, name: str, layers: int, neurons: int, file: str | os.PathLike[str]
    ) -> None:
        """Raise ``OtherModel``, with both names, unless these are of this very model."""
        header = self.header
        if (header.fingerprint, len(header.factors), header.neurons) != (fingerprint, layers, neurons):
            raise errors.OtherModel(
                file,
                f"was made for the model {header.model_name!r}, not for {name!r}; "
                "make its own with powerinfer threshold",
            )


def _name(layer: int) -> str:
    return f"blk.{layer}.thresholds"


def _check(header: ThresholdsHeader, file: Path) -> None:
    def require(condition: bool, problem: str) -> None:
        if not condition:
            raise errors.BadField(file, problem)

    layers = len(header.factors)
    require(1 <= layers <= 4096, f"factors are of {layers} layers, expected 1 to 4096")
    require(1 <= header.neurons <= 1 << 24, f"neurons is {header.neurons}")
    require(len(header.densities) == layers, "densities and factors are of different layers")
    shares = (*header.densities, header.uniform_density)
    require(all(0 <= share <= 1 for share in shares), "a density is not from 0 to 1")
    require(header.max_increase > 0, f"max_increase is {header.max_increase}, expected more than 0")
    cost = header.cost
    require(min(cost.dense_perplexity, cost.perplexity) >= 1, "a perplexity is below 1")
    require(min(cost.ratio_error, cost.kl) >= 0, "cost: an error or divergence is negative")
    require(cost.tokens >= 1, f"cost.tokens is {cost.tokens}")
