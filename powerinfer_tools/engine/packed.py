"""Matrices of a model laid out for the kernels, for all that computes with them."""

from powerinfer_kernels import Matrix, Pool
from powerinfer_tools.model.tensors import Weight


class PackedMatrices:
    """Each packed when it is first asked for: whoever runs the same model in another way shares them."""

    def __init__(self) -> None:
        self._held: dict[int, tuple[Weight, Matrix]] = {}

    def of(self, pool: Pool, weight: Weight) -> Matrix:
        """``weight`` with its rows interleaved for the dense kernels (a copy in huge pages)."""
        if id(weight) not in self._held:
            made = Matrix.pack(pool, weight.data, weight.row_type, weight.rows, weight.columns)
            self._held[id(weight)] = (weight, made)
        return self._held[id(weight)][1]

    @property
    def nbytes(self) -> int:
        """Of all that were packed, in bytes."""
        return sum(matrix.nbytes for _, matrix in self._held.values())
