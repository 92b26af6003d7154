"""Random plain rows of every type, moderate and extreme."""

import numpy as np
import numpy.typing as npt

from powerinfer_kernels import RowType, block_shape, row_bytes

U8 = npt.NDArray[np.uint8]

QUANTISED = tuple(t for t in RowType if not t.is_float)
FLOATS = tuple(t for t in RowType if t.is_float)

#: Byte offsets of the f16 scales within a stored block.
SCALES: dict[RowType, tuple[int, ...]] = {
    RowType.Q8_0: (0,),
    RowType.Q4_0: (0,),
    RowType.Q5_0: (0,),
    RowType.Q4_1: (0, 2),
    RowType.Q5_1: (0, 2),
    RowType.Q4_K: (0, 2),
    RowType.Q5_K: (0, 2),
    RowType.Q6_K: (208,),
    RowType.Q2_K: (80, 82),
    RowType.Q3_K: (108,),
    RowType.IQ4_NL: (0,),
    RowType.IQ4_XS: (0,),
    RowType.IQ3_XXS: (0,),
    RowType.IQ3_S: (0,),
    RowType.IQ2_XXS: (0,),
    RowType.IQ2_XS: (0,),
    RowType.IQ2_S: (0,),
    RowType.IQ1_S: (0,),
    RowType.TQ1_0: (52,),
    RowType.TQ2_0: (64,),
}


def _set_byte_scales(stored: U8, row_type: RowType, values: npt.NDArray[np.float16]) -> None:
    """Powers of two (MXFP4), E4M3 numbers (NVFP4) near the magnitudes, and the scattered f16 of IQ1_M."""
    _, exponent = np.frexp(np.abs(values.astype(np.float32)))
    if row_type == RowType.MXFP4:
        stored[..., 0] = np.where(values == 0, 0, exponent + 125)
    elif row_type == RowType.NVFP4:
        stored[..., :4] = np.clip((exponent[..., None] + 6) * 8 + np.arange(4), 0, 126)
    else:
        words = stored[..., 48:].view(np.uint16)
        words[...] = words & 0xFFF
        shifts = np.arange(0, 16, 4, dtype=np.uint16)
        words |= (np.ascontiguousarray(values).view(np.uint16)[..., None] >> shifts & 15) << 12


def set_scales(data: U8, row_type: RowType, values: npt.NDArray[np.float16]) -> None:
    """Writes f16 scales [rows, stored blocks] into quantised rows; what is near to them where the type has
    others."""
    stored = data.reshape(len(data), -1, block_shape(row_type)[1])
    if row_type not in SCALES:
        _set_byte_scales(stored, row_type, values)
        return
    for at in SCALES[row_type]:
        stored[:, :, at : at + 2] = np.ascontiguousarray(values)[..., None].view(np.uint8)


def random_rows(rng: np.random.Generator, row_type: RowType, rows: int, columns: int) -> U8:
    """Rows of random codes with scales of about 0.1: uint8 [rows, row bytes]."""
    if row_type == RowType.F32:
        return rng.standard_normal((rows, columns)).astype(np.float32).view(np.uint8)
    if row_type == RowType.F16:
        return rng.standard_normal((rows, columns)).astype(np.float16).view(np.uint8)
    if row_type == RowType.BF16:
        words = rng.standard_normal((rows, columns)).astype(np.float32).view(np.uint32)
        return (words >> 16).astype(np.uint16).view(np.uint8)
    data = rng.integers(0, 256, (rows, row_bytes(row_type, columns)), dtype=np.uint8)
    stored = columns // block_shape(row_type)[0]
    set_scales(data, row_type, (rng.standard_normal((rows, stored)) * 0.1).astype(np.float16))
    return data


def extreme_rows(row_type: RowType, columns: int) -> U8:
    """Six rows: all bits set, all clear, and bytes 0x80, each under scales that are large, zero or
    subnormal."""
    data = np.repeat(np.array([0xFF, 0x00, 0x80], np.uint8), 2)[:, None]
    data = np.ascontiguousarray(np.broadcast_to(data, (6, row_bytes(row_type, columns))))
    stored = columns // block_shape(row_type)[0]
    scale = np.array([60000.0, 6e-8, 1.0, -3e-6, 0.0, -60000.0], np.float16)
    set_scales(data, row_type, np.repeat(scale[:, None], stored, axis=1))
    return data
