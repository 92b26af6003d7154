"""Parts of stored tensors: rows of several matrices may be one tensor, one after the other or in turns."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Part:
    """The half ``index`` (0 or 1) along an axis: the even or odd places, or the first or second half."""

    axis: int
    index: int
    in_turns: bool

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of this part of a tensor of ``shape``. Raises ValueError where it has no halves."""
        if len(shape) <= self.axis or shape[self.axis] % 2:
            raise ValueError(f"{' × '.join(map(str, shape))} values have no halves along axis {self.axis}")
        return (*shape[: self.axis], shape[self.axis] // 2, *shape[self.axis + 1 :])

    def of(self, values: Array) -> Array:
        """A view of this part."""
        half = values.shape[self.axis] // 2
        places = slice(self.index, None, 2) if self.in_turns else slice(self.index * half, None)
        if not self.in_turns and not self.index:
            places = slice(0, half)
        return values[(slice(None),) * self.axis + (places,)]


FIRST, SECOND = (Part(0, index, in_turns=False) for index in (0, 1))
#: Of each expert.
EVEN, ODD = (Part(1, index, in_turns=True) for index in (0, 1))


def mxfp4_rows(blocks: Array, scales: Array) -> npt.NDArray[np.uint8]:
    """Blocks of 32 E2M1 codes, uint8 (…, blocks, 16), two neighbours in a byte, with a scale each, uint8
    (…, blocks), as those of GGUF, (…, blocks, 17): a byte has a code of the first half and one of the second
    (OCP microscaling formats; ggml's block_mxfp4)."""
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*blocks.shape[:-1], 2, 16)
    halves = codes[..., 0, :] | codes[..., 1, :] << 4
    return np.concatenate([scales[..., None], halves], axis=-1).astype(np.uint8, copy=False)
