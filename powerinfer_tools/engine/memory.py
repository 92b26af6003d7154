"""Whether a model fits in memory, judged before anything is allocated."""

from powerinfer_tools.errors import ModelError
from powerinfer_tools.model import Model

#: Left to the rest of the system.
MARGIN = 256 << 20


def require_memory(model: Model, context: int, available: int) -> None:
    """Raise ModelError when packed weights and KV cache exceed ``available`` bytes (0: unknown).

    Packed weights take about what they take in the file, as rows are padded to whole tiles; the file itself
    stays mapped, and its pages can be dropped.
    """
    hyper = model.hyper
    weights = sum(info.nbytes for info in model.gguf.tensors.values())
    cache = 4 * context * hyper.kv_width * hyper.layers
    if not available or weights + cache + MARGIN <= available:
        return
    mib = 1 << 20
    raise ModelError(
        f"{model.path}: {weights // mib} MiB of weights and {cache // mib} MiB of KV cache for a context of "
        f"{context} do not fit in the {available // mib} MiB of memory that are free; ask for a shorter "
        "context (-c), or take a smaller model"
    )
