"""How many experts of each layer fit on the hot device: the plan's numbers, or fewer."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from powerinfer_tools.engine.hot.sizes import CHUNK_ROWS, HotSize
from powerinfer_tools.model.ffn_matrices import ExpertsFFN
from powerinfer_tools.model.tensors import Stack, Weight

_F32 = 4


@dataclass(frozen=True)
class HotCounts:
    """Of one layer: how many of its hottest experts are hot, and whether the shared one is."""

    experts: int
    shared: bool

    def __bool__(self) -> bool:
        return bool(self.experts) or self.shared


@dataclass(frozen=True)
class ExpertWidths:
    """What scratch depends on, in values: the model's width, most neurons of an expert that may be hot, kinds
    of input (exact, rounded), and experts of a token with the shared one."""

    width: int
    neurons: int
    inputs: int
    taken: int


def planned(layers: Sequence[ExpertsFFN]) -> tuple[HotCounts, ...]:
    """What the split file says."""
    counts = []
    for layer in layers:
        assert layer.units is not None
        counts.append(HotCounts(layer.units.hot, layer.units.shared_hot))
    return tuple(counts)


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


def router_size(layer: ExpertsFFN) -> int:
    """Bytes of the router, with what weighs the shared expert."""
    return layer.router.nbytes + (0 if layer.shared_gate is None else layer.shared_gate.nbytes)


def products_of(layer: ExpertsFFN) -> list[Weight | Stack]:
    """The matrices that the layer's input is multiplied with: gates and ups."""
    shared = [] if layer.shared is None else [*layer.shared.matrices[:-1]]
    return [*layer.stacks[:-1], *shared]


def longest_row(widths: ExpertWidths) -> int:
    """Most values of a row, and most rows of a matrix."""
    return max(widths.width, widths.neurons)


def scratch_floats(widths: ExpertWidths, tokens: int) -> dict[str, int]:
    """Floats of each piece of scratch: for ``tokens`` tokens the inputs of a layer and of one expert, the
    layer's output, two products, and which tokens take an expert with what weight; and a chunk of rows."""
    each = tokens * widths.width
    pieces = {f"input {kind}": each for kind in range(widths.inputs)}
    pieces |= {f"taken {kind}": each for kind in range(widths.inputs)}
    most = max(tokens, widths.taken)  # a single token's experts are computed at once
    pieces |= {"out": each, "gate": most * widths.neurons, "up": tokens * widths.neurons}
    longest = longest_row(widths)
    return pieces | {"routes": 2 * tokens * widths.taken, "chunk": min(CHUNK_ROWS, longest) * longest}


def expert_size(layer: ExpertsFFN) -> int:
    """Bytes of one expert."""
    return sum(stack.nbytes for stack in layer.stacks) // layer.router.rows


def shared_size(layer: ExpertsFFN) -> int:
    """Bytes of the expert that every token takes."""
    return 0 if layer.shared is None else sum(weight.nbytes for weight in layer.shared.matrices)


def hot_size(
    layers: Sequence[ExpertsFFN], hot: Sequence[HotCounts], widths: ExpertWidths, tokens: int
) -> HotSize:
    """Bytes for these experts and batches of up to ``tokens`` tokens; twice the chunk besides, for the steps
    of unpacking it, and the products of a chunk."""
    weights = sum(_layer_size(layer, counts) for layer, counts in zip(layers, hot, strict=True))
    if not weights:
        return HotSize(0, 0)
    pieces = scratch_floats(widths, tokens)
    products = tokens * min(CHUNK_ROWS, longest_row(widths))
    scratch = _F32 * (sum(pieces.values()) + 2 * pieces["chunk"] + products)
    return HotSize(weights, scratch, experts=weights)


def fitting(
    layers: Sequence[ExpertsFFN], hot: Sequence[HotCounts], room: int, widths: ExpertWidths, tokens: int
) -> tuple[HotCounts, ...]:
    """Of the ``hot`` experts of each layer those that fit in ``room`` bytes.

    Takes the coldest expert off the layer with the largest hot share, again and again, so that all layers
    keep similar shares; then shared experts, from the last layer on, which every token takes.
    """
    left, size = list(hot), hot_size(layers, hot, widths, tokens)
    weights = size.weights
    while any(left) and weights + size.scratch > room:
        shares = [counts.experts / layer.router.rows for counts, layer in zip(left, layers, strict=True)]
        largest = max(range(len(left)), key=lambda i: (shares[i], i))
        if left[largest].experts:
            left[largest] = replace(left[largest], experts=left[largest].experts - 1)
            weights -= expert_size(layers[largest])
        else:
            last = max(index for index, counts in enumerate(left) if counts.shared)
            left[last] = replace(left[last], shared=False)
            weights -= shared_size(layers[last])
    return tuple(left)


def _layer_size(layer: ExpertsFFN, counts: HotCounts) -> int:
    return counts.experts * expert_size(layer) + (shared_size(layer) if counts.shared else 0)
