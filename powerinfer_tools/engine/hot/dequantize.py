"""Blocks of quantised weights to float32, in torch operations, on any device.

The layouts are those of :func:`powerinfer_kernels.repack`: GGUF's (ggml's ``block_*`` structures), or the
form in which a type is computed (kernels/csrc/transcode.h). Results equal
:func:`powerinfer_kernels.dequantize` bit for bit.
"""

from collections.abc import Callable

import torch

from powerinfer_kernels import RowType

Tensor = torch.Tensor


def dequantize(rows: Tensor, row_type: RowType, columns: int) -> Tensor:
    """float32 (rows, columns) of uint8 ``rows`` (rows, packed_row_bytes)."""
    if row_type in _FLOAT_VIEWS:
        return rows.view(_FLOAT_VIEWS[row_type]).to(torch.float32)
    nbytes, unpack = _UNPACK[row_type]
    return unpack(rows.reshape(-1, nbytes)).reshape(len(rows), columns)


def _half(blocks: Tensor, first: int) -> Tensor:
    """The float16 at byte ``first`` of every block, as float32 (blocks, 1)."""
    return blocks[:, first : first + 2].contiguous().view(torch.float16).to(torch.float32)


def _nibbles(packed: Tensor) -> Tensor:
    """Low nibbles of all bytes, then high ones: (blocks, 2·bytes)."""
    return torch.cat((packed & 15, packed >> 4), dim=1)


def _fifth_bits(blocks: Tensor, first: int) -> Tensor:
    """Bits 0 … 31 of the four bytes at ``first``, each as 0 or 16: (blocks, 32)."""
    shifts = torch.arange(8, device=blocks.device, dtype=torch.uint8)
    bits = (blocks[:, first : first + 4, None] >> shifts) & 1
    return bits.reshape(len(blocks), 32) << 4


def _q8_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * blocks[:, 2:].contiguous().view(torch.int8)


def _q4_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:]).to(torch.int8) - 8)


def _q4_1(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * _nibbles(blocks[:, 4:]) + _half(blocks, 2)


def _q5_0(blocks: Tensor) -> Tensor:
    quants = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2)
    return _half(blocks, 0) * (quants.to(torch.int8) - 16)


def _q5_1(blocks: Tensor) -> Tensor:
    quants = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4)
    return _half(blocks, 0) * quants + _half(blocks, 2)


def _sub_scales(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The eight 6-bit scales and minima of a K-quant super-block, each float32 (blocks, 8, 1)."""
    packed = blocks[:, 4:16]
    low, middle, high = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat((low & 63, (high & 15) | ((low >> 6) << 4)), dim=1)
    minima = torch.cat((middle & 63, (high >> 4) | ((middle >> 6) << 4)), dim=1)
    scale, minimum = _half(blocks, 0) * scales, _half(blocks, 2) * minima
    return scale[:, :, None], minimum[:, :, None]


def _k_nibbles(packed: Tensor) -> Tensor:
    """128 bytes as eight sub-blocks of 32: bytes 32j … 32j+31 hold sub-blocks 2j (low) and 2j+1 (high)."""
    groups = packed.reshape(len(packed), 4, 1, 32)
    return torch.cat((groups & 15, groups >> 4), dim=2).reshape(len(packed), 8, 32)


def _q4_k(blocks: Tensor) -> Tensor:
    scale, minimum = _sub_scales(blocks)
    return scale * _k_nibbles(blocks[:, 16:]) - minimum


def _q5_k(blocks: Tensor) -> Tensor:
    scale, minimum = _sub_scales(blocks)
    shifts = torch.arange(8, device=blocks.device, dtype=torch.uint8)[None, :, None]
    fifth = ((blocks[:, None, 16:48] >> shifts) & 1) << 4
    return scale * (_k_nibbles(blocks[:, 48:]) | fifth) - minimum


def _q6_k(blocks: Tensor) -> Tensor:
    count = len(blocks)
    low = blocks[:, :128].reshape(count, 2, 2, 32)
    low = torch.cat((low & 15, low >> 4), dim=2)  # (blocks, half, 4, 32)
    # Not torch.tensor([0, 2, 4, 6]): a copy from the host's memory cannot be recorded into a CUDA graph.
    shifts = torch.arange(0, 8, 2, device=blocks.device, dtype=torch.uint8)[None, None, :, None]
    high = ((blocks[:, 128:192].reshape(count, 2, 1, 32) >> shifts) & 3) << 4
    quants = (low | high).to(torch.int8).reshape(count, 16, 16) - 32
    scales = blocks[:, 192:208].contiguous().view(torch.int8)
    return (_half(blocks, 208) * scales)[:, :, None] * quants


def _f32(blocks: Tensor, first: int) -> Tensor:
    """The float32 at byte ``first`` of every block: (blocks, 1)."""
    return blocks[:, first : first + 4].contiguous().view(torch.float32)


def _looked_up(codes: Tensor, values: tuple[int, ...]) -> Tensor:
    """float32 values[codes], with a table that is filled on the device."""
    table = torch.cat([torch.full((1,), float(value), device=codes.device) for value in values])
    return table.index_select(0, codes.reshape(-1).to(torch.int32)).view(codes.shape)


def _form_codes(blocks: Tensor, first: int) -> Tensor:
    """The nibbles from byte ``first`` on, 16 bytes for 32 columns: (blocks, columns)."""
    packed = blocks[:, first:].reshape(len(blocks), -1, 1, 16)
    return torch.cat((packed & 15, packed >> 4), dim=2).reshape(len(blocks), -1)


def _scaled(scale: Tensor, values: Tensor) -> Tensor:
    """Every scale (blocks, n) times its part of ``values`` (blocks, columns)."""
    return scale[:, :, None] * values.reshape(*scale.shape, -1)


def _signed_16(blocks: Tensor) -> Tensor:
    scales = blocks[:, 4:20].contiguous().view(torch.int8)
    return _scaled(_f32(blocks, 0) * scales, _form_codes(blocks, 20).to(torch.int8) - 4)


def _minimum_16(blocks: Tensor) -> Tensor:
    scale = _f32(blocks, 0) * (blocks[:, 8:24] & 15)
    minimum = _f32(blocks, 4) * (blocks[:, 8:24] >> 4)
    return _scaled(scale, _form_codes(blocks, 24)) - minimum[:, :, None]


def _table_blocks(scales: int, values: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    """256 columns under ``scales`` scales."""

    def unpack(blocks: Tensor) -> Tensor:
        scale = _f32(blocks, 0) * blocks[:, 4 : 4 + scales].contiguous().view(torch.int8)
        return _scaled(scale, _looked_up(_form_codes(blocks, 4 + scales), values))

    return unpack


def _iq4_nl(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * _looked_up(_nibbles(blocks[:, 2:]), _IQ4)


def _mxfp4(blocks: Tensor) -> Tensor:
    exponent = blocks[:, :1].to(torch.int32)
    subnormal = (exponent + 1) << 21  # 2^-128 and 2^-127
    scale = torch.maximum((exponent - 1) << 23, subnormal).view(torch.float32)
    return scale * _looked_up(_nibbles(blocks[:, 1:]), _E2M1)


def _float8_16(blocks: Tensor) -> Tensor:
    scale = (blocks[:, :2].to(torch.int32) << 20).view(torch.float32) * 2.0**119
    return _scaled(scale, _looked_up(_form_codes(blocks, 2), _E2M1))


def _points(*magnitudes: int) -> tuple[int, ...]:
    """Magnitudes of a grid, and from code 8 on their negatives."""
    half = (*magnitudes, *(0,) * (8 - len(magnitudes)))
    return (*half, *(-value for value in half))


_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_E2M1 = _points(0, 1, 2, 3, 4, 6, 8, 12)
_IQ2 = _points(8, 25, 43)
_IQ1 = (-7, 1, 9, 0, -9, -1, 7, 0, *(0,) * 8)

_FLOAT_VIEWS = {RowType.F32: torch.float32, RowType.F16: torch.float16, RowType.BF16: torch.bfloat16}
# Bytes of a block, and the function that unpacks it.
_UNPACK: dict[RowType, tuple[int, Callable[[Tensor], Tensor]]] = {
    RowType.Q8_0: (34, _q8_0),
    RowType.Q4_0: (18, _q4_0),
    RowType.Q4_1: (20, _q4_1),
    RowType.Q5_0: (22, _q5_0),
    RowType.Q5_1: (24, _q5_1),
    RowType.Q4_K: (144, _q4_k),
    RowType.Q5_K: (176, _q5_k),
    RowType.Q6_K: (210, _q6_k),
    RowType.Q2_K: (152, _minimum_16),
    RowType.Q3_K: (148, _signed_16),
    RowType.IQ4_NL: (18, _iq4_nl),
    RowType.IQ4_XS: (140, _table_blocks(8, _IQ4)),
    RowType.MXFP4: (17, _mxfp4),
    RowType.NVFP4: (18, _float8_16),
    RowType.IQ3_XXS: (140, _table_blocks(8, _points(4, 12, 20, 28, 36, 44, 52, 62))),
    RowType.IQ3_S: (140, _table_blocks(8, _points(1, 3, 5, 7, 9, 11, 13, 15))),
    RowType.IQ2_XXS: (140, _table_blocks(8, _IQ2)),
    RowType.IQ2_XS: (148, _table_blocks(16, _IQ2)),
    RowType.IQ2_S: (148, _table_blocks(16, _IQ2)),
    RowType.IQ1_S: (140, _table_blocks(8, _IQ1)),
    RowType.IQ1_M: (148, _table_blocks(16, _IQ1)),
    RowType.TQ1_0: (18, _q4_0),
    RowType.TQ2_0: (18, _q4_0),
}
