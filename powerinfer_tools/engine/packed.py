"""Weights of a model laid out for the kernels, shared by all their users."""

from collections.abc import Sequence

import numpy as np

from powerinfer_formats.split import SplitLayer
from powerinfer_kernels import Bundle, Matrix, Pool
from powerinfer_tools.model.tensors import Weight

_PARTS = ("gate", "up", "down")


class PackedWeights:
    """Each weight is packed when it is first requested. Another run of the same model, in another mode,
    shares the packed weights."""

    def __init__(self) -> None:
        self._matrices: dict[int, tuple[Weight, Matrix]] = {}
        self._rows: dict[tuple[int, str, int | None], tuple[SplitLayer, Matrix]] = {}
        self._bundles: dict[tuple[int, int], list[tuple[SplitLayer, Bundle]]] = {}

    def of(self, pool: Pool, weight: Weight) -> Matrix:
        """``weight`` with its rows interleaved for the dense kernels (a copy in huge pages)."""
        if id(weight) not in self._matrices:
            shape = (weight.row_type, weight.rows, weight.columns)
            made = Matrix.pack(pool, weight.data, *shape, scale=weight.scale)
            self._matrices[id(weight)] = (weight, made)
        return self._matrices[id(weight)][1]

    def rows(self, pool: Pool, layer: SplitLayer, kind: str, first: int) -> Matrix:
        """All rows of one kind of neuron from position ``first`` on, for the dense kernels."""
        return self._matrix(pool, layer, kind, first)

    def columns(self, pool: Pool, layer: SplitLayer, kind: str) -> Matrix:
        """All rows of one kind, with the neurons in the source's order; "down" stands for the rows of the
        source's own down projection, which ``layer`` must have."""
        return self._matrix(pool, layer, kind, None)

    def bundle(self, pool: Pool, layer: SplitLayer, first: int, kinds: Sequence[str]) -> Bundle:
        """The rows of ``kinds`` of all neurons from position ``first`` on. If a bundle with more kinds
        exists, its rows are used. The rows that feed the activation are a bundle's gate rows, whatever the
        file calls them."""
        place = dict(zip(layer.kinds, ("gate", *layer.kinds[1:]), strict=True))
        parts = {place[kind]: True for kind in kinds}
        made = self._bundles.setdefault((id(layer), first), [])
        for _, bundle in made:
            held_parts = {part for part, kind in zip(_PARTS, bundle.types, strict=True) if kind is not None}
            if parts.keys() <= held_parts:
                return bundle.only(**parts)
        rows = {
            place[kind]: (np.ascontiguousarray(layer.rows(kind, first, layer.neurons)), layer.type_of(kind))
            for kind in kinds
        }
        made.append((layer, Bundle.pack(pool, layer.neurons - first, layer.width, **rows)))
        return made[-1][1]

    @property
    def nbytes(self) -> int:
        """Size of all packed weights, in bytes."""
        matrices = sum(made.nbytes for _, made in (*self._matrices.values(), *self._rows.values()))
        return matrices + sum(made.nbytes for several in self._bundles.values() for _, made in several)

    def _matrix(self, pool: Pool, layer: SplitLayer, kind: str, first: int | None) -> Matrix:
        key = (id(layer), kind, first)
        if key not in self._rows:
            pack = _source_matrix if first is None else _matrix
            self._rows[key] = (layer, pack(pool, layer, kind, first or 0))
        return self._rows[key][1]


def _matrix(pool: Pool, layer: SplitLayer, kind: str, first: int) -> Matrix:
    rows = layer.rows(kind, first, layer.neurons)
    return Matrix.pack(pool, rows.reshape(-1), layer.type_of(kind), len(rows), layer.width)


def _source_matrix(pool: Pool, layer: SplitLayer, kind: str, _: int) -> Matrix:
    if kind == "down":
        assert layer.columns is not None
        down = layer.columns
        return Matrix.pack(pool, down.rows.reshape(-1), down.row_type, layer.width, layer.neurons)
    rows = layer.rows(kind, 0, layer.neurons)[np.argsort(layer.order)]
    return Matrix.pack(pool, rows.reshape(-1), layer.type_of(kind), layer.neurons, layer.width)
