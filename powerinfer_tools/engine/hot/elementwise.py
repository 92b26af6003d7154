"""Norms, rotary positions and the rounding of activations in torch operations, on any device.

The steps are the same as in the C kernels, so a block has the same result on either side, except for the
order of float32 sums. No step reads a number from the host's memory, which a CUDA graph could not record.
"""

from dataclasses import dataclass

import torch

Tensor = torch.Tensor
#: Values that share a scale, and the largest code.
BLOCK, LARGEST_CODE = 32, 127
#: The reciprocal of a smaller scale could overflow: a block with a smaller scale is all zeros.
LEAST_SCALE = 2.0**-126


@dataclass(frozen=True)
class HotNorm:
    """A norm by root mean square ("rms") or by mean and deviation ("layer"); float32 (width,). ``fused``:
    by a Triton kernel."""

    kind: str
    weight: Tensor
    bias: Tensor | None
    eps: float
    fused: bool = False

    def into(self, x: Tensor, exact: Tensor, rounded: Tensor | None, codes: Tensor | None = None) -> None:
        """exact (T, width) = norm(x), may be in place; ``rounded``: the form for the integer kernels;
        ``codes``, of a single token: the form for fused kernels."""
        if self.fused and x.is_contiguous():
            self._fused(x, exact, rounded, codes)
            return
        assert codes is None
        self.apply(x, exact)
        if rounded is not None:
            round_activations(exact, rounded)

    def apply(self, x: Tensor, out: Tensor, groups: int = 1) -> None:
        """out (T, groups · width) = norm(x), of each of ``groups`` equal parts of a row by itself; may be
        in place."""
        if self.fused and x.is_contiguous():
            self._fused(x, out, None, None)
            return
        parts = x.view(len(x), groups, -1)
        if self.kind == "layer":
            parts = parts - parts.mean(dim=-1, keepdim=True)
        factor = torch.rsqrt(parts.square().mean(dim=-1, keepdim=True) + self.eps)
        scaled = parts * factor * self.weight
        if self.bias is not None:
            scaled += self.bias
        out.view(parts.shape).copy_(scaled)

    def _fused(self, x: Tensor, exact: Tensor, rounded: Tensor | None, codes: Tensor | None) -> None:
        from powerinfer_kernels.triton_launch import normalize

        # Successive rows, or parts of rows, are treated as the parts of one row.
        x, exact = x.view(1, -1), exact.view(1, -1)
        rounded = None if rounded is None else rounded.view(1, -1)
        normalize(x, self.weight, self.bias, self.eps, exact, rounded, codes, layer=self.kind == "layer")


def round_activations(x: Tensor, out: Tensor) -> None:
    """out (T, columns) = x in the form for the integer kernels: codes times scales, block by block
    (quantize.inc)."""
    blocks = x.reshape(len(x), -1, BLOCK)
    codes, scale = block_codes(blocks)
    bits = scale.view(torch.int32)
    kept = ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)
    kept = kept.masked_fill(scale < LEAST_SCALE, 0.0).masked_fill(~torch.isfinite(scale), torch.nan)
    out.view(blocks.shape).copy_(codes * kept)


def block_codes(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """round-half-even(x / d), zeros where that is no number, and d = max|x| / 127 (…, 1) of blocks
    (…, BLOCK)."""
    largest = blocks.abs().amax(dim=-1, keepdim=True)
    # A number of the host's would be inverted on CUDA, and multiplied with: other bits than a division's.
    scale = largest / torch.full_like(largest, LARGEST_CODE)
    usable = (scale >= LEAST_SCALE) & torch.isfinite(scale)
    return (blocks * scale.reciprocal()).round().masked_fill(~usable, 0.0), scale


def rotate(x: Tensor, cos: Tensor, sin: Tensor, heads: int, style: str, begin: int = 0) -> None:
    """Rotate the pairs of each head of x (T, heads · head_dim) by their angles (T, rope_dim / 2), in place.

    Style "norm" pairs (2i, 2i + 1), "neox" (i, i + rope_dim / 2), counted from ``begin`` on; other values
    stay.
    """
    half = cos.shape[1]
    rows = x.view(len(x), heads, -1)[..., begin:]
    if style == "norm":
        first, second = rows[..., 0 : 2 * half : 2], rows[..., 1 : 2 * half : 2]
    else:
        first, second = rows[..., :half], rows[..., half : 2 * half]
    c, s = cos[:, None, :], sin[:, None, :]
    turned = first * c - second * s, first * s + second * c
    first.copy_(turned[0])
    second.copy_(turned[1])
