"""Whether a model fits in memory, judged before anything is allocated."""

from collections.abc import Collection

from powerinfer_formats.model_source import ModelSource
from powerinfer_kernels import packed_row_bytes, row_bytes
from powerinfer_tools.errors import ModelError
from powerinfer_tools.model.hyperparameters import Hyperparameters
from powerinfer_tools.model.loading import Model
from powerinfer_tools.model.tensors import MATRIX_TYPES

#: Left to the rest of the system.
MARGIN = 256 << 20


def kv_bytes_per_position(hyper: Hyperparameters, kind: str) -> float:
    """Bytes of the keys and values of one position in one layer: half precision, or with "q8_0" a byte a
    value and half precision for each 32."""
    return (hyper.kv_width + hyper.value_width) * (1 + 2 / 32 if kind == "q8_0" else 2)


def require_session_memory(model: Model, context: int, kv_type: str, promised: int, available: int) -> None:
    """Raise ModelError when the KV cache of one more session exceeds the ``available`` bytes (0: unknown)
    without those that are ``promised`` to others."""
    hyper = model.hyper
    cache = round(context * kv_bytes_per_position(hyper, kv_type) * hyper.layers)
    if not available or cache + promised + MARGIN <= available:
        return
    mib = 1 << 20
    raise ModelError(
        f"{model.path}: {cache // mib} MiB of KV cache for one more session of {context} tokens do not fit "
        f"in the {available // mib} MiB of memory that are free, of which other sessions may need "
        f"{promised // mib} MiB; close one, or ask for a shorter context"
    )


def require_memory(model: Model, context: int, kv_type: str, available: int, elsewhere: int = 0) -> None:
    """Raise ModelError when packed weights and KV cache exceed ``available`` bytes (0: unknown), but for
    those that are ``elsewhere``, in the memory of a GPU.

    Packed weights take what `packed_nbytes` says, as rows are padded to whole tiles; the file itself stays
    mapped, and its pages can be dropped.
    """
    hyper = model.hyper
    weights = packed_nbytes(model.gguf)
    cache = round(context * kv_bytes_per_position(hyper, kv_type) * hyper.layers)
    if not available or weights + cache - elsewhere + MARGIN <= available:
        return
    mib = 1 << 20
    there = f", but for {elsewhere // mib} MiB in VRAM," if elsewhere else ""
    raise ModelError(
        f"{model.path}: {weights // mib} MiB of weights and {cache // mib} MiB of KV cache for a context of "
        f"{context}{there} do not fit in the {available // mib} MiB of memory that are free; ask for a "
        "shorter context (-c) or a smaller cache (--kv-type q8_0), or take a smaller model"
    )


def packed_nbytes(source: ModelSource, without: Collection[str] = ()) -> int:
    """Bytes of all tensors of a file in memory, but for those of the names ``without``: as in
    the file, but for types that are computed in another form."""
    return sum(
        info.nbytes
        if int(info.row_type) not in MATRIX_TYPES
        else info.nbytes
        // row_bytes(info.row_type, info.shape[-1])
        * packed_row_bytes(info.row_type, info.shape[-1])
        for name, info in source.tensors.items()
        if name not in without
    )
