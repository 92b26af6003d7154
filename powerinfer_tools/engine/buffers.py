"""The activations of a forward pass: allocated once, reused for every token."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from powerinfer_kernels import Activations, aligned
from powerinfer_tools.model.footprint import footprint_of
from powerinfer_tools.model.loading import Model

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int32]
#: Values in one block of quantised activations.
BLOCK = 32


@dataclass(frozen=True)
class Buffers:
    """float32 [tokens, …] unless said; ``*_acts`` are quantised copies, None where the width allows none.
    ``neurons``: the most of any layer's FFN, or expert."""

    tokens: Integers
    positions: Integers | None  # (T,): rows of the table of learnt positions
    x: Floats  # (T, width): the residual stream
    normed: Floats  # (T, width): input of the FFN matrices
    normed_acts: Activations | None
    residual_acts: Activations | None  # of x, for predictors that read it
    block_out: Floats  # (T, width): a block's output before it joins the residual stream
    hot_out: Floats | None  # (T, width): the hot device's part of an FFN
    scores: Floats | None  # (T, neurons): what predictors say of each neuron, or act(gate)
    neurons: int
    scratch: "Scratch"  # all of it, by name

    @property
    def gate(self) -> Floats:
        """(T, neurons): what the activation reads."""
        return self.scratch.named("gate", self.neurons)

    @property
    def up(self) -> Floats:
        """(T, neurons): what its result is multiplied with, or scratch."""
        return self.scratch.named("up", self.neurons)

    @property
    def nbytes(self) -> int:
        """Size of all buffers in bytes."""
        other = [array for array in (self.tokens, self.positions) if array is not None]
        return self.scratch.nbytes + sum(array.nbytes for array in other)


class Scratch:
    """Buffers float32 (tokens, width) by name, and their quantised copies: allocated when they are first
    named. Names whose widths differ from layer to layer share one memory where it is large enough."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self._floats: dict[str, list[Floats]] = {}
        self._copies: dict[tuple[int, int], Activations | None] = {}

    def add(self, name: str, floats: Floats) -> Floats:
        """Memory for ``name``, which may be that of another name."""
        self._floats.setdefault(name, []).append(floats)
        return floats

    def named(self, name: str, width: int) -> Floats:
        """The buffer (tokens, width) of that name; the same array each time."""
        held = self._floats.setdefault(name, [])
        for floats in held:
            if floats.shape[1] == width:
                return floats
        larger = (floats for floats in held if floats.shape[1] > width)
        source = next(larger, None)
        made = aligned((self.tokens, width), np.float32) if source is None else narrowed(source, width)
        held.append(made)
        return made

    def copy(self, floats: Floats) -> Activations | None:
        """Where the quantised copy of a buffer goes; None for a width that allows none."""
        key = (place(floats), floats.shape[1])
        if key not in self._copies:
            self._copies[key] = activations(self.tokens, floats.shape[1])
        return self._copies[key]

    @property
    def nbytes(self) -> int:
        """Size of all buffers in bytes; memory that names share counts once."""
        sizes: dict[int, int] = {}
        for floats in (floats for held in self._floats.values() for floats in held):
            sizes[place(floats)] = max(sizes.get(place(floats), 0), floats.nbytes)
        copies = [copy for copy in self._copies.values() if copy is not None]
        return sum(sizes.values()) + sum(a.q.nbytes + a.d.nbytes + a.s.nbytes for a in copies)


def allocate(model: Model, tokens: int, *, hot: bool, scores: bool) -> Buffers:
    """Buffers for up to ``tokens`` tokens at a time; ``hot`` and ``scores``: also what a hot device and
    predictors (or thresholds of a source model) need."""
    scratch, hyper, widths = Scratch(tokens), model.hyper, footprint_of(model).body.buffers
    for name, width in widths.items():
        if name != "tokens":
            # Each at its widest first, so that layers with less share its memory.
            scratch.named(name, width)
    normed, x = scratch.named("normed", hyper.width), scratch.named("x", hyper.width)
    if not hyper.parallel:
        scratch.add("attention_input", normed)
    return Buffers(
        tokens=aligned((tokens,), np.int32),
        positions=None if model.positions is None else aligned((tokens,), np.int32),
        x=x,
        normed=normed,
        normed_acts=scratch.copy(normed),
        residual_acts=scratch.copy(x) if scores else None,
        block_out=scratch.named("block_out", hyper.width),
        hot_out=scratch.named("hot_out", hyper.width) if hot else None,
        scores=scratch.named("scores", hyper.neurons) if scores else None,
        neurons=max(hyper.neurons, widths.get("gate", 0)),
        scratch=scratch,
    )


def activations(tokens: int, columns: int) -> Activations | None:
    """Quantised activations, or None for a width that no quantised matrix can have."""
    return Activations(tokens, columns) if columns % BLOCK == 0 else None


def place(floats: Floats) -> int:
    """The address of an array."""
    return int(floats.__array_interface__["data"][0])


def narrowed(buffer: Floats, width: int) -> Floats:
    """The same memory as (tokens, width), contiguous."""
    tokens = len(buffer)
    return buffer.reshape(-1)[: tokens * width].reshape(tokens, width)
