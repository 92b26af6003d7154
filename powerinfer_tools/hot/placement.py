"""How many neurons of each layer fit on the hot device: the plan's numbers, or fewer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from powerinfer_formats.split import SplitLayer

#: Rows that are dequantised at a time; bounds the scratch memory of the device.
CHUNK_ROWS = 512


#: Part of a GPU's budget that is for what is not asked for by name: code and CUDA graphs, which the driver
#: places, and what allocators round up. Stated, not measured.
OVERHEAD = 32 << 20
#: Left free of a GPU's memory, besides, when no budget is given.
MARGIN = 256 << 20
#: Each matrix starts on such a boundary of the device's memory.
ALIGNMENT = 256


@dataclass(frozen=True)
class HotSize:
    """Bytes on the hot device: weights, and scratch for the activations and one chunk of dequantised rows."""

    weights: int
    scratch: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.scratch


def hot_size(layers: Sequence[SplitLayer], hot: Sequence[int], tokens: int) -> HotSize:
    """Bytes for the first ``hot[i]`` neurons of every layer and batches of up to ``tokens`` tokens.

    Scratch: the input and the output (tokens, width), three (tokens, chunk) products, all float32, and a
    chunk of rows in float32 with as much again twice for the steps of unpacking it.
    """
    weights = sum(layer.neuron_bytes * count for layer, count in zip(layers, hot, strict=True))
    if not weights:
        return HotSize(0, 0)
    width = layers[0].width
    chunk = min(CHUNK_ROWS, max(hot))
    return HotSize(weights, 4 * (tokens * (2 * width + 3 * chunk) + 3 * chunk * width))


def fit(layers: Sequence[SplitLayer], limit: int | None, group: int, tokens: int) -> list[int]:
    """Hot neurons per layer within ``limit`` bytes (None: as planned).

    Takes groups off the layer with the largest hot share, again and again, so that all layers keep similar
    shares; within a layer the coldest neurons go first, since neurons are sorted.
    """
    hot = [layer.hot_neurons for layer in layers]
    if limit is None:
        return hot
    fits: Callable[[], bool] = lambda: hot_size(layers, hot, tokens).total <= limit  # noqa: E731
    while any(hot) and not fits():
        shares = [count / layer.neurons for count, layer in zip(hot, layers, strict=True)]
        largest = max(range(len(hot)), key=lambda i: (shares[i], i))
        hot[largest] = max(0, (hot[largest] - 1) // group * group)
    return hot
