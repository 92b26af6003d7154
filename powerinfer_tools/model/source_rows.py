"""What the stages that write models ask of a source model's weights."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from powerinfer_kernels import Plain, RowType, dequantize
from powerinfer_tools.errors import ConvertError
from powerinfer_tools.model.down_rows import on_threads
from powerinfer_tools.model.ffn_matrices import ExpertsFFN
from powerinfer_tools.model.layer_weights import mixing_weights
from powerinfer_tools.model.loading import Model
from powerinfer_tools.model.split_rows import plain_rows
from powerinfer_tools.model.tensors import Weight

Bytes = npt.NDArray[np.uint8]
#: Values looked at at a time when weights are checked.
_CHECK_VALUES = 1 << 20


def shared_weights(model: Model) -> Iterator[Weight]:
    """All matrices that are in no layer."""
    yield model.embedding
    if model.positions is not None:
        yield model.positions
    if model.inputs is not None:
        yield from (model.inputs.table, model.inputs.project)
    if model.streams is not None:
        yield from (*model.streams.enter, *model.streams.leave)
    if model.head is not model.embedding:
        yield model.head


def layer_weights(model: Model, index: int) -> Iterator[Weight]:
    """All matrices of one layer of a source model."""
    layer = model.layers[index]
    yield from mixing_weights(layer)
    if layer.feeds is None:
        return
    if not isinstance(layer.ffn, ExpertsFFN):
        yield from layer.source_ffn.matrices
        return
    experts = layer.ffn
    yield experts.router
    for stack in experts.stacks:
        yield from stack.weights
    if experts.shared is not None:
        yield from experts.shared.matrices
    if experts.shared_gate is not None:
        yield experts.shared_gate


def check_finite(model: Model, weight: Weight) -> None:
    """Raise ConvertError, with the place, for a value that is not finite."""
    rows = plain_rows(weight)
    step = max(1, _CHECK_VALUES // weight.columns)

    def fault(first: int) -> tuple[int, int] | None:
        piece = np.ascontiguousarray(rows[first : first + step])
        row = Plain(piece, weight.row_type, len(piece), weight.columns).first_not_finite()
        if row is None:
            return None
        values = dequantize(piece[row], weight.row_type, 1, weight.columns)
        return first + row, int(np.argmin(np.isfinite(values[0])))

    for message in on_threads(fault, range(0, weight.rows, step)):
        if message is not None:
            raise ConvertError(
                f"{model.path}: tensor {weight.name} has a value that is not finite at row {message[0]}, "
                f"column {message[1]}; the file is damaged"
            )


def relative_error(values: npt.NDArray[np.float32], rows: Bytes, row_type: RowType) -> float:
    """‖rows − values‖ / ‖values‖ (Frobenius) of ``values`` (n, k) stored as ``rows`` of ``row_type``."""
    back = dequantize(rows.reshape(-1), row_type, *values.shape)
    norm = float(np.linalg.norm(values.astype(np.float64)))
    return float(np.linalg.norm((back - values).astype(np.float64))) / norm if norm else 0.0
