"""Where a tensor of GGUF comes from in a Hugging Face directory, and what its stored values become."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from powerinfer_formats.block_types import TensorType
from powerinfer_formats.safetensors_header import StoredTensor
from powerinfer_tools.model.huggingface.block_scales import FP8
from powerinfer_tools.model.huggingface.changes import Change
from powerinfer_tools.model.huggingface.parts import Part

#: FP8 is widened by its scales.
TYPES = {"F32": TensorType.F32, "F16": TensorType.F16, "BF16": TensorType.BF16, FP8: TensorType.F32}


@dataclass(frozen=True)
class Origin:
    """``stored`` in the weights, transposed, a part of it taken, then changed; or ``values`` made here.
    ``stack``: of one matrix for each expert; ``mxfp4``: blocks of codes, and their scales."""

    stored: tuple[str, ...] = ()
    stack: bool = False
    change: Change | None = None
    values: npt.NDArray[np.float32] | None = None
    part: Part | None = None
    transposed: bool = False
    mxfp4: bool = False

    @property
    def as_stored(self) -> bool:
        """Whether the stored values are those of GGUF, in their order."""
        made = (self.change, self.values, self.part)
        return all(one is None for one in made) and not self.transposed and not self.mxfp4

    def shape(self, shape: tuple[int, ...], *, squeezed: bool) -> tuple[int, ...]:
        """The shape of what ``shape`` becomes; ``squeezed``: without its ones."""
        if squeezed:
            shape = tuple(size for size in shape if size != 1) or (1,)
        if self.transposed:
            shape = (*shape[:-2], shape[-1], shape[-2])
        return shape if self.part is None else self.part.shape(shape)

    def rearranged(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """What is asked of values in their stored shape, as a view of them."""
        if self.transposed:
            values = values.swapaxes(-1, -2)
        return values if self.part is None else self.part.of(values)


def described(tensor: StoredTensor) -> str:
    """Shape and type of a stored tensor, for people."""
    return f"{' × '.join(map(str, tensor.shape))} of {tensor.dtype}"


def as_float32(data: npt.NDArray[np.uint8], dtype: str) -> npt.NDArray[np.float32]:
    """Values of a vector; bfloat16 is the upper half of a float32."""
    if dtype == "BF16":
        return (data.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return np.asarray(data.view("<f2" if dtype == "F16" else "<f4"), dtype=np.float32)
