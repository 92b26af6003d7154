"""Random weight matrices for the tiny test models, in every row type, with the values they stand for.

The reference for what the bits mean is the ``gguf`` package, an implementation that is not ours. It quantises
the plain types; for K types, which it can only read, valid blocks are drawn at random instead.
"""

from dataclasses import dataclass

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray

#: Values in a super-block of every K type.
K_BLOCK = 256
K_TYPES = (GGMLQuantizationType.Q4_K, GGMLQuantizationType.Q5_K, GGMLQuantizationType.Q6_K)


@dataclass(frozen=True)
class Weights:
    """One tensor: ``data`` as the file holds it, ``values`` float32 as a perfect reader sees it."""

    row_type: GGMLQuantizationType
    data: NDArray[np.generic]
    values: NDArray[np.float32]

    def rows(self, order: NDArray[np.int64]) -> "Weights":
        """The same tensor with row ``order[i]`` at i. Rows are quantised one by one, so no value changes."""
        return Weights(self.row_type, self.data[order], self.values[order])


def random_weights(
    rng: np.random.Generator, shape: tuple[int, int], deviation: float, row_type: GGMLQuantizationType
) -> Weights:
    """A matrix [rows, columns] of zero mean and about the standard ``deviation``.

    Raises ValueError where the columns are no multiple of the type's block.
    """
    block, _ = GGML_QUANT_SIZES[row_type]
    if shape[1] % block:
        raise ValueError(f"{shape[1]} columns are no multiple of {block}, the block of {row_type.name}")
    if row_type in K_TYPES:
        data: NDArray[np.generic] = _random_k_rows(rng, shape, deviation, row_type)
    else:
        normal = rng.standard_normal(shape, dtype=np.float32) * np.float32(deviation)
        data = quantize(normal, row_type)
    values = np.ascontiguousarray(dequantize(data, row_type), dtype=np.float32).reshape(shape)
    assert np.isfinite(values).all()
    return Weights(row_type, data, values)


def vector(values: NDArray[np.float32]) -> Weights:
    """A norm weight or a bias: converters keep everything of one dimension in float32."""
    return Weights(GGMLQuantizationType.F32, values, values)


def _random_k_rows(
    rng: np.random.Generator, shape: tuple[int, int], deviation: float, row_type: GGMLQuantizationType
) -> NDArray[np.uint8]:
    blocks = shape[0] * (shape[1] // K_BLOCK)
    maker = _random_q6_k if row_type == GGMLQuantizationType.Q6_K else _random_q45_k
    return maker(rng, blocks, deviation, row_type).reshape(shape[0], -1)


def _random_q45_k(
    rng: np.random.Generator, blocks: int, deviation: float, row_type: GGMLQuantizationType
) -> NDArray[np.uint8]:
    """Super-blocks d, dmin (f16) | 12 bytes of scales and mins | [32 bytes of fifth bits] | 128 of nibbles

    A value is d·scale·q − dmin·min with q uniform over 0…top; dmin = d·top/2 and min ≈ scale centre it on 0.
    """
    top = 31 if row_type == GGMLQuantizationType.Q5_K else 15
    scales = rng.integers(16, 64, (blocks, 8))
    mins = np.clip(scales + rng.integers(-4, 5, scales.shape), 0, 63)
    spread = np.sqrt((scales**2).mean()) * np.sqrt(((top + 1) ** 2 - 1) / 12)
    d = (deviation / spread * rng.uniform(0.5, 1.5, (blocks, 1))).astype(np.float16)
    dmin = (d.astype(np.float32) * (top / 2)).astype(np.float16)
    quants = rng.integers(0, 256, (blocks, 128 if top == 15 else 160), dtype=np.uint8)
    return np.concatenate([d.view(np.uint8), dmin.view(np.uint8), _pack_6_bit(scales, mins), quants], axis=1)


def _pack_6_bit(scales: NDArray[np.int64], mins: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Eight scales and mins below 64 in 12 bytes: the first four of each keep the upper bits of the rest."""
    low = scales[:, :4] | ((scales[:, 4:] >> 4) << 6)
    middle = mins[:, :4] | ((mins[:, 4:] >> 4) << 6)
    high = (scales[:, 4:] & 15) | ((mins[:, 4:] & 15) << 4)
    return np.concatenate([low, middle, high], axis=1).astype(np.uint8)


def _random_q6_k(
    rng: np.random.Generator, blocks: int, deviation: float, row_type: GGMLQuantizationType
) -> NDArray[np.uint8]:
    """Super-blocks: 128 bytes of low nibbles | 64 of bit pairs | 16 int8 scales | d (f16); q is −32…31."""
    assert row_type == GGMLQuantizationType.Q6_K
    bits = rng.integers(0, 256, (blocks, 192), dtype=np.uint8)
    scales = rng.integers(32, 128, (blocks, 16)) * rng.choice([-1, 1], (blocks, 16))
    spread = np.sqrt((scales**2).mean()) * np.sqrt((64**2 - 1) / 12)
    d = (deviation / spread * rng.uniform(0.5, 1.5, (blocks, 1))).astype(np.float16)
    return np.concatenate([bits, scales.astype(np.int8).view(np.uint8), d.view(np.uint8)], axis=1)
