"""Whether a model fits in memory, judged before anything is allocated."""

from powerinfer_tools.errors import ModelError
from powerinfer_tools.model.footprint import footprint_of
from powerinfer_tools.model.loading import Model

#: Left to the rest of the system.
MARGIN = 256 << 20


def require_session_memory(model: Model, context: int, kv_type: str, promised: int, available: int) -> None:
    """Raise ModelError when the state of one more session exceeds the ``available`` bytes (0: unknown) less
    the bytes that are ``promised`` to other sessions."""
    cache = footprint_of(model).session_bytes(context, kv_type)
    if not available or cache + promised + MARGIN <= available:
        return
    mib = 1 << 20
    raise ModelError(
        f"{model.path}: {cache // mib} MiB of KV cache for one more session of {context} tokens do not fit "
        f"in the {available // mib} MiB of memory that are free, of which other sessions may need "
        f"{promised // mib} MiB; close one, or ask for a shorter context"
    )


def require_memory(model: Model, context: int, kv_type: str, available: int, elsewhere: int = 0) -> None:
    """Raise ModelError when packed weights and KV cache, less the bytes ``elsewhere`` (in the memory of a
    GPU), exceed ``available`` bytes (0: unknown).

    The file itself stays mapped, with the embedding in it, and its pages can be dropped.
    """
    weights = footprint_of(model).packed_nbytes
    cache = footprint_of(model).session_bytes(context, kv_type)
    if not available or weights + cache - elsewhere + MARGIN <= available:
        return
    mib = 1 << 20
    in_vram = f", but for {elsewhere // mib} MiB in VRAM," if elsewhere else ""
    raise ModelError(
        f"{model.path}: {weights // mib} MiB of weights and {cache // mib} MiB of KV cache for a "
        f"context of {context}{in_vram} do not fit in the {available // mib} MiB of memory that are free; "
        "ask for a shorter context (-c) or a smaller cache (--kv-type q8_0), or take a smaller model"
    )
