"""What the experts of a model take on the hot device: weights of one, and scratch that all share."""

from collections.abc import Sequence
from dataclasses import dataclass

from powerinfer_tools.engine.hot.sizes import CHUNK_ROWS
from powerinfer_tools.model.ffn_matrices import ExpertsFFN
from powerinfer_tools.model.tensors import Stack, Weight

_F32 = 4


@dataclass(frozen=True)
class ExpertWidths:
    """What scratch depends on, in values: the model's width, most neurons of an expert that may be hot, kinds
    of input (exact, rounded), and experts of a token with the shared one."""

    width: int
    neurons: int
    inputs: int
    taken: int

    @property
    def longest_row(self) -> int:
        """Most values of a row, and most rows of a matrix."""
        return max(self.width, self.neurons)


def widths_of(layers: Sequence[ExpertsFFN], used: int) -> ExpertWidths:
    """Of a model whose tokens take ``used`` experts."""
    products = [weight for layer in layers for weight in products_of(layer)]
    shared = [layer.shared.up.rows for layer in layers if layer.shared is not None]
    neurons = max(layer.up.rows // layer.router.rows for layer in layers)
    return ExpertWidths(
        width=layers[0].router.columns,
        neurons=max(neurons, *shared) if shared else neurons,
        inputs=len({weight.row_type.is_float for weight in products}),
        taken=used + 1,
    )


def products_of(layer: ExpertsFFN) -> list[Weight | Stack]:
    """The matrices that the layer's input is multiplied with: gates and ups."""
    shared = [] if layer.shared is None else [*layer.shared.matrices[:-1]]
    return [*layer.stacks[:-1], *shared]


def router_size(layer: ExpertsFFN) -> int:
    """Bytes of the router, with what weighs the shared expert."""
    return layer.router.nbytes + (0 if layer.shared_gate is None else layer.shared_gate.nbytes)


def expert_size(layer: ExpertsFFN) -> int:
    """Bytes of one expert."""
    return sum(stack.nbytes for stack in layer.stacks) // layer.router.rows


def shared_size(layer: ExpertsFFN) -> int:
    """Bytes of the expert that every token takes."""
    return 0 if layer.shared is None else sum(weight.nbytes for weight in layer.shared.matrices)


def scratch_floats(widths: ExpertWidths, tokens: int) -> dict[str, int]:
    """Floats of each piece of scratch: for ``tokens`` tokens the inputs of a layer and of one expert, the
    layer's output, two products, and which tokens take an expert with what weight; and a chunk of rows."""
    each = tokens * widths.width
    pieces = {f"input {kind}": each for kind in range(widths.inputs)}
    pieces |= {f"taken {kind}": each for kind in range(widths.inputs)}
    most = max(tokens, widths.taken)  # a single token's experts are computed at once
    pieces |= {"out": each, "gate": most * widths.neurons, "up": tokens * widths.neurons}
    longest = widths.longest_row
    return pieces | {"routes": 2 * tokens * widths.taken, "chunk": min(CHUNK_ROWS, longest) * longest}


def scratch_bytes(widths: ExpertWidths, tokens: int) -> int:
    """All of it, with twice the chunk besides, for the steps of unpacking it, and the products of a chunk."""
    pieces = scratch_floats(widths, tokens)
    products = tokens * min(CHUNK_ROWS, widths.longest_row)
    return _F32 * (sum(pieces.values()) + 2 * pieces["chunk"] + products)
