"""The activations of a forward pass: allocated once, reused for every token."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from powerinfer_kernels import Activations, aligned
from powerinfer_tools.model.architectures import ArchitectureSpec
from powerinfer_tools.model.hyperparameters import Hyperparameters

Floats = npt.NDArray[np.float32]
#: Values in one block of quantised activations.
BLOCK = 32


@dataclass(frozen=True)
class Buffers:
    """float32 [tokens, …] unless said; ``*_acts`` are quantised copies, None where the width allows none."""

    tokens: npt.NDArray[np.int32]
    positions: npt.NDArray[np.int32] | None  # (T,): rows of the table of learnt positions
    x: Floats  # (T, width): the residual stream
    normed: Floats  # (T, width): input of the FFN matrices
    normed_acts: Activations | None
    residual_acts: Activations | None  # of x, for predictors that read it
    attention_input: Floats  # (T, width): the same memory as normed unless the blocks are parallel
    attention_acts: Activations | None
    query: Floats  # (T, query_width)
    key: Floats  # (T, kv_width)
    value: Floats  # (T, kv_width)
    attended: Floats  # (T, query_width)
    attended_acts: Activations | None
    gate: Floats  # (T, neurons)
    up: Floats  # (T, neurons)
    hidden_acts: Activations | None
    block_out: Floats  # (T, width): a block's output before it joins the residual stream
    hot_out: Floats | None  # (T, width): the hot device's part of an FFN
    scores: Floats | None  # (T, neurons): what predictors say of each neuron, or act(gate)

    @property
    def nbytes(self) -> int:
        """Size of all buffers in bytes."""
        total = 0
        for value in {id(value): value for value in vars(self).values()}.values():
            if isinstance(value, Activations):
                total += value.q.nbytes + value.d.nbytes + value.s.nbytes
            elif value is not None:
                total += value.nbytes
        return total


def allocate(
    spec: ArchitectureSpec, hyper: Hyperparameters, tokens: int, *, hot: bool, scores: bool
) -> Buffers:
    """Buffers for up to ``tokens`` tokens at a time; ``hot`` and ``scores``: also what a hot device and
    predictors (or thresholds of a source model) need."""

    def floats(width: int) -> Floats:
        return aligned((tokens, width), np.float32)

    shared = hyper.routing.shared_neurons if hyper.routing else 0
    widest = max(hyper.neurons, shared)
    normed, normed_acts = floats(hyper.width), activations(tokens, hyper.width)
    return Buffers(
        tokens=aligned((tokens,), np.int32),
        positions=None if spec.position_offset is None else aligned((tokens,), np.int32),
        x=floats(hyper.width),
        normed=normed,
        normed_acts=normed_acts,
        residual_acts=activations(tokens, hyper.width) if scores else None,
        attention_input=floats(hyper.width) if spec.parallel else normed,
        attention_acts=activations(tokens, hyper.width) if spec.parallel else normed_acts,
        query=floats(hyper.query_width),
        key=floats(hyper.kv_width),
        value=floats(hyper.kv_width),
        attended=floats(hyper.query_width),
        attended_acts=activations(tokens, hyper.query_width),
        gate=floats(widest),
        up=floats(widest),
        hidden_acts=activations(tokens, hyper.neurons),
        block_out=floats(hyper.width),
        hot_out=floats(hyper.width) if hot else None,
        scores=floats(hyper.neurons) if scores else None,
    )


def activations(tokens: int, columns: int) -> Activations | None:
    """Quantised activations, or None for a width that no quantised matrix can have."""
    return Activations(tokens, columns) if columns % BLOCK == 0 else None


def narrowed(buffer: Floats, width: int) -> Floats:
    """The same memory as (tokens, width), contiguous."""
    tokens = len(buffer)
    return buffer.reshape(-1)[: tokens * width].reshape(tokens, width)
