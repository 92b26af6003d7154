"""Bytes of experts and of what routing them takes, on both sides.

An expert is a whole matrix of each kind, with the bits of the source: packed as tiles in RAM, plain rows in
VRAM. The numbers are the engine's own; tests compare them.
"""

from dataclasses import dataclass

from powerinfer_tools.engine.hot.expert_sizes import ExpertWidths, scratch_bytes
from powerinfer_tools.model.matrices import FLOAT_TYPES, MatrixShape
from powerinfer_tools.model.shapes import ExpertsShape, LayerShape, ModelShape


@dataclass(frozen=True)
class SideBytes:
    """What the same weights take on either side, bytes."""

    vram: int
    ram: int


def side_bytes(matrices: tuple[MatrixShape, ...]) -> SideBytes:
    """Of whole matrices."""
    return SideBytes(sum(m.nbytes for m in matrices), sum(m.packed_nbytes for m in matrices))


def expert_bytes(layer: LayerShape) -> SideBytes:
    """Of one expert that a router chooses."""
    return side_bytes(layer.ffn)


def shared_bytes(layer: LayerShape) -> SideBytes:
    """Of the shared expert; nothing where there is none."""
    return side_bytes(experts_of(layer).shared)


def router_bytes(layer: LayerShape) -> SideBytes:
    """Of the router and the shared expert's weight, which are where the layer's attention is; nothing without
    experts."""
    return SideBytes(0, 0) if layer.experts is None else side_bytes(layer.experts.router)


def unit_bytes(layer: LayerShape) -> int:
    """VRAM of the smallest unit of a layer that can be placed."""
    sizes = [expert_bytes(layer).vram, shared_bytes(layer).vram]
    return min(size for size in sizes if size)


def experts_of(layer: LayerShape) -> ExpertsShape:
    """The experts of a layer that has some."""
    assert layer.experts is not None
    return layer.experts


def widest_neurons(layer: LayerShape) -> int:
    """Most neurons that are computed at a time."""
    return max(layer.up.rows, layer.experts.shared_neurons if layer.experts else 0)


def hot_scratch_bytes(shape: ModelShape, batch: int) -> int:
    """Scratch of the hot side, see :func:`~powerinfer_tools.engine.hot.expert_sizes.scratch_floats`."""
    products = [m for one in shape.layers for m in (*one.ffn[:-1], *experts_of(one).shared[:-1])]
    widths = ExpertWidths(
        width=shape.width,
        neurons=max(widest_neurons(layer) for layer in shape.layers),
        inputs=len({matrix.row_type in FLOAT_TYPES for matrix in products}),
        taken=experts_of(shape.layers[0]).used + 1,
    )
    return scratch_bytes(widths, batch)
