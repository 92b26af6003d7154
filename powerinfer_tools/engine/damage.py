"""Results that are no numbers: whose fault it is, in words for the user."""

from typing import Any

import numpy as np
import numpy.typing as npt

from powerinfer_kernels import RowType
from powerinfer_tools.errors import ModelError
from powerinfer_tools.model.loading import Model

_PIECE = 1 << 22


def require_finite(values: npt.NDArray[Any], model: Model) -> None:
    """Raise ModelError unless all `values` (results of the layers, or logits) are finite numbers.

    Only then are the weights looked at: where those that can hold a NaN or an infinity hold none, it is the
    arithmetic that ran over, most often a key or value beyond what the KV cache's half precision can say.
    """
    # The extremes are finite only where each value is, and NaN is both; row by row, while it is in the cache.
    if all(np.isfinite(row.max()) and np.isfinite(row.min()) for row in np.atleast_2d(values)):
        return
    name = _damaged(model)
    if name is not None:
        raise ModelError(
            f"{model.path}: the model's results are not finite: its weights are damaged ({name} holds NaN or "
            "infinity)"
        )
    raise ModelError(
        f"{model.path}: the model's results are not finite, though its weights are: a value in the layers or "
        "in the KV cache goes beyond what half precision can hold (65,504)"
    )


def _damaged(model: Model) -> str | None:
    """The first tensor of a float type, or of blocks with a scale, that is not finite."""
    from powerinfer_kernels import dequantize, row_bytes

    for name, info in model.source.tensors.items():
        try:
            kind = RowType(info.row_type)
        except ValueError:
            continue
        for data in model.source.pieces(name):
            columns = info.shape[-1]
            size = row_bytes(kind, columns)
            rows = data.reshape(-1, size)
            step = max(1, _PIECE // columns)
            for start in range(0, len(rows), step):
                piece = np.ascontiguousarray(rows[start : start + step])
                if not np.isfinite(dequantize(piece.reshape(-1), kind, len(piece), columns)).all():
                    return name
    return None
