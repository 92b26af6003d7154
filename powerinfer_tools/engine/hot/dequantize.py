"""Blocks of quantised weights to float32, in torch operations, on any device.

The layouts are those of GGUF (ggml's ``block_*`` structures); results equal
:func:`powerinfer_kernels.dequantize` bit for bit.
"""

from collections.abc import Callable

import torch

from powerinfer_kernels import RowType, block_shape

Tensor = torch.Tensor


def dequantize(rows: Tensor, row_type: RowType, columns: int) -> Tensor:
    """float32 (rows, columns) of uint8 ``rows`` (rows, row_bytes)."""
    if row_type in _FLOAT_VIEWS:
        return rows.view(_FLOAT_VIEWS[row_type]).to(torch.float32)
    values, nbytes = block_shape(row_type)
    blocks = rows.reshape(-1, nbytes)
    return _UNPACK[row_type](blocks).reshape(len(rows), columns // values * values)


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
    # Not torch.tensor([0, 2, 4, 6]): what comes from the host's memory cannot be recorded into a CUDA graph.
    shifts = torch.arange(0, 8, 2, device=blocks.device, dtype=torch.uint8)[None, None, :, None]
    high = ((blocks[:, 128:192].reshape(count, 2, 1, 32) >> shifts) & 3) << 4
    quants = (low | high).to(torch.int8).reshape(count, 16, 16) - 32
    scales = blocks[:, 192:208].contiguous().view(torch.int8)
    return (_half(blocks, 208) * scales)[:, :, None] * quants


_FLOAT_VIEWS = {RowType.F32: torch.float32, RowType.F16: torch.float16, RowType.BF16: torch.bfloat16}
_UNPACK: dict[RowType, Callable[[Tensor], Tensor]] = {
    RowType.Q8_0: _q8_0,
    RowType.Q4_0: _q4_0,
    RowType.Q4_1: _q4_1,
    RowType.Q5_0: _q5_0,
    RowType.Q5_1: _q5_1,
    RowType.Q4_K: _q4_k,
    RowType.Q5_K: _q5_k,
    RowType.Q6_K: _q6_k,
}
