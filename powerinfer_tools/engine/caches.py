"""The KV caches outside the hot device."""

from collections.abc import Sequence

from powerinfer_kernels import KernelError, KVCache
from powerinfer_tools.engine.memory import kv_bytes_per_position
from powerinfer_tools.errors import ModelError
from powerinfer_tools.model.loading import Model


def require_kv_type(model: Model, kind: str) -> None:
    """Raise ModelError where the heads of ``model`` cannot be kept as ``kind``."""
    if kind == "q8_0" and model.hyper.head_dim % 32:
        raise ModelError(
            f"{model.path}: a q8_0 KV cache needs heads of a multiple of 32 values, these have "
            f"{model.hyper.head_dim}; take f16"
        )


def allocate_caches(model: Model, context: int, kind: str, here: Sequence[bool]) -> list[KVCache | None]:
    """A cache of ``context`` positions for each layer whose attention is ``here``. Raises ModelError."""
    hyper = model.hyper
    try:
        return [KVCache(context, hyper.kv_heads, hyper.head_dim, kind) if wanted else None for wanted in here]
    except MemoryError:
        size = round(context * kv_bytes_per_position(hyper, kind) * sum(here))
        raise ModelError(
            f"no memory for a KV cache of {size} bytes; ask for a shorter context (-c)"
        ) from None
    except KernelError as error:
        raise ModelError(f"{model.path}: {error}") from None
