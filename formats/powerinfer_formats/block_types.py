"""The tensor types that ggml defines: their names and how many bytes a block of values takes.

All of them can be listed and sized; the kernels decide which of them can be used for computing. The
numbers are ggml's (``ggml_type`` in ggml.h and the block structs of ggml-common.h).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from types import MappingProxyType
from typing import Literal


class TensorType(IntEnum):
    """ggml's type ids. ``RowType`` of the kernels is the computable subset with the same numbers."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q8_1 = 9
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    Q8_K = 15
    IQ2_XXS = 16
    IQ2_XS = 17
    IQ3_XXS = 18
    IQ1_S = 19
    IQ4_NL = 20
    IQ3_S = 21
    IQ2_S = 22
    IQ4_XS = 23
    I8 = 24
    I16 = 25
    I32 = 26
    I64 = 27
    F64 = 28
    IQ1_M = 29
    BF16 = 30
    TQ1_0 = 34
    TQ2_0 = 35
    MXFP4 = 39
    NVFP4 = 40
    Q1_0 = 41


#: The types in which stages write rows.
WrittenType = Literal["Q8_0", "Q4_0", "F16", "BF16", "F32"]
#: The types that relufy writes gate and up in.
RelufiedType = Literal["Q4_1", "Q4_0", "Q5_1", "Q5_0", "Q8_0", "F16", "BF16", "F32"]


@dataclass(frozen=True)
class BlockShape:
    """``values`` consecutive values of a row are stored in ``nbytes`` bytes."""

    values: int
    nbytes: int


_SHAPES: dict[TensorType, tuple[int, int]] = {
    TensorType.F32: (1, 4),
    TensorType.F16: (1, 2),
    TensorType.Q4_0: (32, 18),
    TensorType.Q4_1: (32, 20),
    TensorType.Q5_0: (32, 22),
    TensorType.Q5_1: (32, 24),
    TensorType.Q8_0: (32, 34),
    TensorType.Q8_1: (32, 40),
    TensorType.Q2_K: (256, 84),
    TensorType.Q3_K: (256, 110),
    TensorType.Q4_K: (256, 144),
    TensorType.Q5_K: (256, 176),
    TensorType.Q6_K: (256, 210),
    TensorType.Q8_K: (256, 292),
    TensorType.IQ2_XXS: (256, 66),
    TensorType.IQ2_XS: (256, 74),
    TensorType.IQ3_XXS: (256, 98),
    TensorType.IQ1_S: (256, 50),
    TensorType.IQ4_NL: (32, 18),
    TensorType.IQ3_S: (256, 110),
    TensorType.IQ2_S: (256, 82),
    TensorType.IQ4_XS: (256, 136),
    TensorType.I8: (1, 1),
    TensorType.I16: (1, 2),
    TensorType.I32: (1, 4),
    TensorType.I64: (1, 8),
    TensorType.F64: (1, 8),
    TensorType.IQ1_M: (256, 56),
    TensorType.BF16: (1, 2),
    TensorType.TQ1_0: (256, 54),
    TensorType.TQ2_0: (256, 66),
    TensorType.MXFP4: (32, 17),
    TensorType.NVFP4: (64, 36),
    TensorType.Q1_0: (128, 18),
}

BLOCK_SHAPES: Mapping[int, BlockShape] = MappingProxyType(
    {int(kind): BlockShape(*shape) for kind, shape in _SHAPES.items()}
)

# Ids that ggml has given up: files that carry them come from old or patched programs.
REMOVED_TYPES: Mapping[int, str] = MappingProxyType(
    {4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8",
     36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8"}
)  # fmt: skip


def type_name(row_type: int) -> str:
    """Name of a type id in ggml, or the number in words where there is none."""
    if row_type in BLOCK_SHAPES:
        return TensorType(row_type).name
    return REMOVED_TYPES.get(row_type, f"type {row_type}")


def row_bytes(row_type: int, columns: int) -> int:
    """Bytes of one row of ``columns`` values.

    Raises ``ValueError`` for a type that ggml does not define and for columns that are not a whole number
    of blocks.
    """
    block = BLOCK_SHAPES.get(row_type)
    if block is None:
        raise ValueError(f"tensor type {row_type} is not one that ggml defines")
    if columns <= 0 or columns % block.values:
        name = type_name(row_type)
        raise ValueError(f"{columns} columns are not a whole number of {name} blocks of {block.values}")
    return columns // block.values * block.nbytes
