"""One layer as train sees it: its weights as floats, and its records, parted by what they are for."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from powerinfer_formats.trace import TraceFile
from powerinfer_kernels import dequantize, reference
from powerinfer_tools.errors import TrainError
from powerinfer_tools.model.loading import Model
from powerinfer_tools.model.split_rows import transposed_down
from powerinfer_tools.model.tensors import Weight
from powerinfer_tools.stages.train.naming import Bools, Floats

#: Fewest chunks that can be parted into learning, checking and testing.
MIN_CHUNKS = 10
#: Records that the error of leaving neurons out is computed on.
_ERROR_RECORDS = 512


@dataclass(frozen=True)
class Records:
    """Normalised FFN inputs (t, width) and which neurons were active (t, neurons)."""

    inputs: Floats
    active: Bools

    def first(self, count: int) -> "Records":
        """The first ``count`` of them."""
        return Records(self.inputs[:count], self.active[:count])


@dataclass(frozen=True)
class Parts:
    """Which chunks of the trace are to learn from, to check with, and to test on."""

    learn: Sequence[int]
    check: Sequence[int]
    test: Sequence[int]


def parted(chunks: int) -> Parts:
    """Of ten chunks, seven, two and one."""
    places = np.arange(chunks) % 10
    groups = (np.flatnonzero((places >= low) & (places < high)) for low, high in ((0, 7), (7, 9), (9, 10)))
    return Parts(*(group.tolist() for group in groups))


class LayerData:
    """Layer ``index`` of a source model, with its records in a trace; read when asked for."""

    def __init__(self, model: Model, trace: TraceFile, index: int) -> None:
        chunks = len(trace.header.chunks)
        if chunks < MIN_CHUNKS:
            raise TrainError(
                f"{trace.path} has {chunks} chunks of records, too few to learn from and to judge by; "
                "profile with a larger --trace (4096, say), or more text"
            )
        self.model, self.trace, self.index = model, trace, index
        self.ffn = model.layers[index].source_ffn
        self._parts = parted(chunks)

    @cached_property
    def gate(self) -> Floats:
        """The rows that the activation reads, (neurons, width): up in an FFN without gate."""
        return _floats(self.ffn.first)

    def gates(self, inputs: Floats) -> Floats:
        """What the activation reads, (t, neurons), less what it must be above for a neuron to be active."""
        return np.asarray(inputs @ self.gate.T + self.added, np.float32)

    @cached_property
    def added(self) -> Floats:
        """The part of :meth:`gates` that does not depend on the input, (neurons): bias less cut."""
        bias, cut = self.model.layers[self.index].ffn_bias, self.model.hyper.activation_cut
        return np.full(self.model.hyper.neurons, -cut, np.float32) + (0 if bias is None else bias)

    @cached_property
    def learn(self) -> Records:
        """Records to learn from."""
        return self._records(self._parts.learn)

    @cached_property
    def check(self) -> Records:
        """Records to choose by."""
        return self._records(self._parts.check)

    @cached_property
    def test(self) -> Records:
        """Records to measure on, used for nothing else."""
        return self._records(self._parts.test)

    @property
    def gate_bytes(self) -> int:
        """Bytes of the rows that the activation reads."""
        return self.ffn.first.nbytes

    @property
    def other_bytes(self) -> int:
        """Bytes of the other rows."""
        return (self.ffn.factor.nbytes if self.ffn.factor else 0) + self.ffn.down.nbytes

    def rows_touched(self, named: Bools, active: Bools) -> float:
        """Mean bytes of rows that a token reads where the neurons ``named`` are computed and ``active`` is
        the truth, both (t, neurons): the gates of the named neurons, the other rows of neurons that are
        both."""
        return float(named.mean()) * self.gate_bytes + float((named & active).mean()) * self.other_bytes

    def unit_losses(self) -> Floats:
        """Mean square, over the active ones of the records to learn from, of what a gate of one adds to the
        output of the FFN, (neurons)."""
        inputs, active = self.learn.inputs, self.learn.active
        columns: Floats = np.square(transposed_down(self.ffn)).sum(axis=1)
        if self.ffn.factor is None:
            return columns
        factors = np.square(inputs @ _floats(self.ffn.factor).T)
        return np.asarray((factors * active).sum(axis=0) / (active.sum(axis=0) + 1) * columns, np.float32)

    def missing(self, predicted: Sequence[Bools]) -> list[float]:
        """For each set of predicted neurons (t, neurons) of the first records of :attr:`check`: mean squared
        norm, over tokens, of what the FFN's output loses without the others."""
        inputs = self.check.first(_ERROR_RECORDS).inputs
        hyper, factor = self.model.hyper, self.ffn.factor
        hidden = reference.activate(
            self.gates(inputs).astype(np.float64) + hyper.activation_cut,
            None if factor is None else (inputs @ _floats(factor).T).astype(np.float64),
            hyper.activation,
            hyper.activation_cut,
        ).astype(np.float32)
        down = transposed_down(self.ffn)
        lost = (np.where(named[: len(inputs)], np.float32(0), hidden) @ down for named in predicted)
        return [float(np.square(vectors).sum(axis=1, dtype=np.float64).mean()) for vectors in lost]

    def _records(self, chunks: Sequence[int]) -> Records:
        inputs, active = self.trace.read(self.index, chunks)
        return Records(inputs.astype(np.float32), active)


def _floats(weight: Weight) -> npt.NDArray[np.float32]:
    return dequantize(weight.data, weight.row_type, weight.rows, weight.columns)
