"""Valid random blocks of every row type, as fast as random bytes can be drawn.

A row's values have zero mean and a standard deviation of about 1/√columns. The block layouts are those of the
GGUF format (ggml's ``block_q4_0`` and so on): scales first or last, the rest free bits, so that only scales
need care.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from powerinfer_formats.block_types import BLOCK_SHAPES, BlockShape, TensorType
from powerinfer_kernels import RowType, dequantize

Bytes = NDArray[np.uint8]
Maker = Callable[[np.random.Generator, int, float], Bytes]


@dataclass(frozen=True)
class Block:
    """One row type: its number in the format, the size of a block, and what draws ``n`` blocks."""

    code: TensorType
    shape: BlockShape
    make: Maker

    @property
    def values(self) -> int:
        """Values of a block."""
        return self.shape.values

    @property
    def nbytes(self) -> int:
        """Bytes of a block."""
        return self.shape.nbytes


def random_rows(
    rng: np.random.Generator, row_type: str, rows: int, columns: int, deviation: float | None = None
) -> Bytes:
    """``rows`` rows of ``columns`` values, [rows, row bytes], of another standard ``deviation`` where one is
    given. Columns must be a multiple of the block."""
    block = BLOCKS[row_type]
    if columns % block.values:
        raise ValueError(f"{columns} columns are no multiple of {block.values}, the block of {row_type}")
    blocks = rows * (columns // block.values)
    return block.make(rng, blocks, columns**-0.5 if deviation is None else deviation).reshape(rows, -1)


#: What is left of σ after :func:`balance`: (2 · Σ k² for k = 1 … 7) / 16 of (16² − 1) / 12.
BALANCED = (17.5 / 21.25) ** 0.5


def balance(rows: Bytes) -> None:
    """Turns the lowest code of Q4_0 rows, −8, into 0: codes −8 to 7 have a mean of −1/2, and where the input
    has a mean, too, all products would move together: what tokens have in common would grow from layer to
    layer."""
    blocks = rows.reshape(-1, BLOCKS["Q4_0"].nbytes)[:, 2:]
    blocks |= ((blocks & 0x0F) == 0).astype(np.uint8) << 3
    blocks |= ((blocks & 0xF0) == 0).astype(np.uint8) << 7


def fitting_type(row_type: str, columns: int) -> str:
    """``row_type``, or what quantisers take instead where its block does not divide ``columns``."""
    return row_type if columns % BLOCKS[row_type].values == 0 else _FALLBACK[row_type]


#: For rows that no super-block of 256 fits: the plain type with the next number of bits.
_FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "NVFP4": "MXFP4"} | dict.fromkeys(
    (
        "Q2_K",
        "Q3_K",
        "IQ4_XS",
        "IQ3_XXS",
        "IQ3_S",
        "IQ2_XXS",
        "IQ2_XS",
        "IQ2_S",
        "IQ1_S",
        "IQ1_M",
        "TQ1_0",
        "TQ2_0",
    ),
    "IQ4_NL",
)


def _scales(rng: np.random.Generator, blocks: int, middle: float) -> NDArray[np.float16]:
    """Positive scales [blocks, 1] spread over a factor of three around ``middle``."""
    return (middle * rng.uniform(0.5, 1.5, (blocks, 1))).astype(np.float16)


def _bits(rng: np.random.Generator, blocks: int, nbytes: int) -> Bytes:
    return np.frombuffer(rng.bytes(blocks * nbytes), dtype=np.uint8).reshape(blocks, nbytes)


def _deviation_of(levels: int) -> float:
    """Standard deviation of a whole number uniform over ``levels`` values."""
    return float(np.sqrt((levels**2 - 1) / 12))


def _join(*parts: NDArray[np.generic]) -> Bytes:
    return np.concatenate([np.ascontiguousarray(part).view(np.uint8) for part in parts], axis=1)


def _symmetric(levels: int, nbytes: int) -> Maker:
    """Q4_0, Q5_0, Q8_0: scale d | bits; a value is d·(q − levels/2)."""

    def make(rng: np.random.Generator, blocks: int, deviation: float) -> Bytes:
        return _join(_scales(rng, blocks, deviation / _deviation_of(levels)), _bits(rng, blocks, nbytes))

    return make


def _with_minimum(levels: int, nbytes: int) -> Maker:
    """Q4_1, Q5_1: scale d | minimum m | bits; a value is d·q + m, centred by m = −d·(levels − 1)/2."""

    def make(rng: np.random.Generator, blocks: int, deviation: float) -> Bytes:
        d = _scales(rng, blocks, deviation / _deviation_of(levels))
        m = (d.astype(np.float32) * (-(levels - 1) / 2)).astype(np.float16)
        return _join(d, m, _bits(rng, blocks, nbytes))

    return make


def _super_with_minimum(levels: int, nbytes: int) -> Maker:
    """Q4_K, Q5_K: d | dmin | 8 scales and mins of 6 bits in 12 bytes | bits; a value is d·scale·q − dmin·min.

    All 12 bytes are the same in every block: scales and mins of 36, so that dmin = d·(levels − 1)/2 centres.
    """
    # 36 = 0b100100: of the last four, the upper two bits (2) lie above the first four's, the rest (4) apart.
    packed = np.array([0b10100100] * 8 + [0b01000100] * 4, dtype=np.uint8)

    def make(rng: np.random.Generator, blocks: int, deviation: float) -> Bytes:
        d = _scales(rng, blocks, deviation / (36 * _deviation_of(levels)))
        dmin = (d.astype(np.float32) * ((levels - 1) / 2)).astype(np.float16)
        scales = np.broadcast_to(packed, (blocks, 12))
        return _join(d, dmin, scales, _bits(rng, blocks, nbytes))

    return make


def _q6_k(rng: np.random.Generator, blocks: int, deviation: float) -> Bytes:
    """Bits | 16 int8 scales | d; a value is d·scale·(q − 32)."""
    scales = rng.integers(32, 128, (blocks, 16), dtype=np.int8) * rng.choice(
        np.array([-1, 1], np.int8), (blocks, 16)
    )
    d = _scales(rng, blocks, deviation / (84 * _deviation_of(64)))
    return _join(_bits(rng, blocks, 192), scales, d)


def _packed(row_type: str, at: int, minimum_at: int | None = None) -> Maker:
    """Types that are packed for size: bits that are all free but for a half-precision d at byte ``at``, and
    one for the minimum of Q2_K, which 3/2 d centres."""

    def make(rng: np.random.Generator, blocks: int, deviation: float) -> Bytes:
        stored = _bits(rng, blocks, BLOCKS[row_type].nbytes).copy()
        if row_type == "TQ2_0":
            _without_code_3(stored)
        scales = _scales(rng, blocks, deviation / _unit_deviation(row_type))
        stored[:, at : at + 2] = scales.view(np.uint8)
        if minimum_at is not None:
            stored[:, minimum_at : minimum_at + 2] = (scales * np.float16(1.5)).view(np.uint8)
        return stored

    return make


def _without_code_3(blocks: Bytes) -> None:
    """The code that no quantiser writes becomes 1."""
    blocks ^= (blocks & blocks >> 1 & 0x55) << 1


@cache
def _unit_deviation(row_type: str) -> float:
    """Root mean square of what random bits stand for under scales of one: 8 columns in 256 blocks."""
    block, kind = BLOCKS[row_type], RowType[row_type]
    samples = np.random.default_rng(0).integers(0, 256, (256, block.nbytes), dtype=np.uint8)
    one = np.float16(1).tobytes()
    if row_type == "TQ2_0":
        _without_code_3(samples)
    if row_type == "Q2_K":
        samples[:, 80:84] = np.frombuffer(one + np.float16(1.5).tobytes(), np.uint8)
    elif row_type == "IQ1_M":
        _scatter(samples, np.full((256, 1), 1, np.float16))
    elif row_type == "MXFP4":
        samples[:, 0] = 128
    else:
        at = {"Q3_K": 108, "TQ1_0": 52, "TQ2_0": 64}.get(row_type, 0)
        samples[:, at : at + 2] = np.frombuffer(one, np.uint8)
    return float(np.sqrt(np.square(dequantize(samples.reshape(-1), kind, 256, block.values)).mean()))


def _scatter(blocks: Bytes, scales: NDArray[np.float16]) -> None:
    """Writes the d of IQ1_M, which lies in the upper nibbles of the last four words."""
    words = blocks[:, 48:].view(np.uint16)
    words &= 0xFFF
    words |= (scales.view(np.uint16) >> np.arange(0, 16, 4, dtype=np.uint16) & 15) << 12


def _iq1_m(rng: np.random.Generator, blocks: int, deviation: float) -> Bytes:
    rows = np.ascontiguousarray(_bits(rng, blocks, 56)).copy()
    _scatter(rows, _scales(rng, blocks, deviation / _unit_deviation("IQ1_M")))
    return rows


def _mxfp4(rng: np.random.Generator, blocks: int, deviation: float) -> Bytes:
    """Scales are powers of two: the next one, or the one below (together 2^-0.34 of the next one)."""
    exponent = 128 + int(np.round(np.log2(deviation / _unit_deviation("MXFP4")) + 0.34))
    scales = rng.integers(exponent - 1, exponent + 1, (blocks, 1), dtype=np.uint8)
    return _join(scales, _bits(rng, blocks, 16))


def _nvfp4(rng: np.random.Generator, blocks: int, deviation: float) -> Bytes:
    """Scales of E4M3 within a factor of two; values are E2M1 of standard deviation 2.2."""
    lowest = int(np.clip((np.log2(deviation / 2.2) + 6.5) * 8, 0, 112))
    return _join(rng.integers(lowest, lowest + 8, (blocks, 4), dtype=np.uint8), _bits(rng, blocks, 32))


def _f32(rng: np.random.Generator, blocks: int, deviation: float) -> Bytes:
    values = rng.standard_normal((blocks, 1), dtype=np.float32) * np.float32(deviation)
    return values.view(np.uint8)


def _f16(rng: np.random.Generator, blocks: int, deviation: float) -> Bytes:
    return _f32(rng, blocks, deviation).view(np.float32).astype(np.float16).view(np.uint8)


def _bf16(rng: np.random.Generator, blocks: int, deviation: float) -> Bytes:
    return np.ascontiguousarray(_f32(rng, blocks, deviation)[:, 2:])


_MAKERS: dict[str, Maker] = {
    "F32": _f32,
    "F16": _f16,
    "BF16": _bf16,
    "Q4_0": _symmetric(16, 16),
    "Q4_1": _with_minimum(16, 16),
    "Q5_0": _symmetric(32, 20),
    "Q5_1": _with_minimum(32, 20),
    "Q8_0": _symmetric(256, 32),
    "Q4_K": _super_with_minimum(16, 128),
    "Q5_K": _super_with_minimum(32, 160),
    "Q6_K": _q6_k,
    "Q2_K": _packed("Q2_K", 80, 82),
    "Q3_K": _packed("Q3_K", 108),
    "IQ4_NL": _packed("IQ4_NL", 0),
    "IQ4_XS": _packed("IQ4_XS", 0),
    "MXFP4": _mxfp4,
    "NVFP4": _nvfp4,
    "IQ3_XXS": _packed("IQ3_XXS", 0),
    "IQ3_S": _packed("IQ3_S", 0),
    "IQ2_XXS": _packed("IQ2_XXS", 0),
    "IQ2_XS": _packed("IQ2_XS", 0),
    "IQ2_S": _packed("IQ2_S", 0),
    "IQ1_S": _packed("IQ1_S", 0),
    "IQ1_M": _iq1_m,
    "TQ1_0": _packed("TQ1_0", 52),
    "TQ2_0": _packed("TQ2_0", 64),
}
#: By the name of the type; sizes as the format has them.
BLOCKS = {
    name: Block(TensorType[name], BLOCK_SHAPES[TensorType[name]], make) for name, make in _MAKERS.items()
}
