"""FP8 weights with a scale for each block of rows and columns, as directories of Qwen and DeepSeek have them.

A matrix ``NAME`` of E4M3 numbers has a float matrix ``NAME_scale_inv`` beside it, and each value is the
number times the scale of its block: E4M3 as in the OCP specification of 8-bit floating point, without
infinities.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from powerinfer_tools.errors import ModelError
from powerinfer_tools.model.huggingface.config import Config

FP8 = "F8_E4M3"
SCALES_ENDING = "_scale_inv"
_BIAS, _MANTISSA_BITS = 7, 3


@dataclass(frozen=True)
class BlockScales:
    """How many rows and columns share a scale."""

    rows: int
    columns: int

    @classmethod
    def read(cls, config: Config) -> "BlockScales | None":
        """What ``quantization_config`` says; None where there is none. Raises FormatError, and ModelError for
        weights that are quantised in another way."""
        if not config.has("quantization_config"):
            return None
        section = config.section("quantization_config")
        method, sizes = str(section.get("quant_method"))[:40], section.get("weight_block_size")
        if method == "mxfp4":  # its blocks have their scales beside them
            return None
        if method == "fp8" and type(sizes) is list and len(sizes) == 2:
            rows, columns = (_size(section, size) for size in sizes)
            return cls(rows, columns)
        kind = f"{method!r} without scales of blocks" if method == "fp8" else repr(method)
        raise ModelError(
            f"{config.file}: weights quantised by {kind} (quantization_config) are not supported; "
            "take the model's F16 or BF16 weights, or a GGUF file of it"
        )

    def shape(self, rows: int, columns: int) -> tuple[int, int]:
        """The shape of the scales of a matrix."""
        return -(-rows // self.rows), -(-columns // self.columns)

    def values(self, data: npt.NDArray[np.uint8], scales: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Numbers uint8 (rows, columns) times their scales, float32."""
        columns = data.shape[1]
        values = _table()[data]
        for index, row_of_scales in enumerate(scales):
            part = values[index * self.rows : (index + 1) * self.rows]
            part *= np.repeat(row_of_scales, self.columns)[:columns]
        return values


def _size(section: Config, size: object) -> int:
    if type(size) is not int or not 1 <= size <= 1 << 16:
        raise section.fail("weight_block_size", "is no pair of whole numbers from 1 to 65536")
    return size


def _table() -> npt.NDArray[np.float32]:
    """The value of each of the 256 numbers."""
    codes = np.arange(256)
    exponent, mantissa = (codes >> _MANTISSA_BITS) & 15, codes & 7
    normal = np.ldexp(1 + mantissa / 8, exponent - _BIAS)
    values = np.where(exponent == 0, np.ldexp(mantissa / 8, 1 - _BIAS), normal)
    values = np.where((codes & 127) == 127, np.nan, values)
    return np.where(codes & 128, -values, values).astype(np.float32)
