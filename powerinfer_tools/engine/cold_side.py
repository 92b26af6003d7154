"""What the host computes of a layer's FFN, or of its experts, as those see it who write the program and who
work with a hot side: a dense FFN is one expert that every token takes, with weight one."""

from dataclasses import dataclass
from typing import Protocol

from powerinfer_tools.engine.blocks import BlockWriter, FFNOutput
from powerinfer_tools.engine.buffers import Buffers, Floats
from powerinfer_tools.engine.factor_thresholds import FactorThresholds
from powerinfer_tools.engine.hot.routes import SHARED, Route
from powerinfer_tools.engine.layers_on_disk import LayersOnDisk
from powerinfer_tools.engine.neurons_on_disk import NeuronsOnDisk
from powerinfer_tools.engine.observation import LayerCounters
from powerinfer_tools.engine.packed import PackedWeights


@dataclass(frozen=True)
class Computed:
    """Shares of the neurons of sparse FFNs, over what has run: ``named`` by what selects them, and
    ``confirmed`` by the gate, where that is computed for the named ones."""

    named: float
    confirmed: float


class ColdFFN(Protocol):
    """One layer's FFN, or its experts, laid out for the kernels. Operations are appended in the order of the
    methods; those of :meth:`write` leave the sum of what is here."""

    @property
    def neurons(self) -> int:
        """Neurons computed here."""

    @property
    def nbytes(self) -> int:
        """Size of the weights as laid out, in bytes."""

    @property
    def quantized(self) -> bool:
        """Whether the FFN's input is needed in its quantised form."""

    @property
    def in_rows(self) -> bool:
        """Whether the result is left in ``block_out`` for a merge, instead of in the residual stream."""

    @property
    def work(self) -> str:
        """What a timeline calls the work beside a hot device."""

    def bytes_per_token(self, computed: Computed) -> float:
        """Bytes that one decoded token touches."""

    def bytes_per_pass(self, computed: Computed) -> float:
        """Mean bytes that a pass over any number of tokens touches."""

    def before(self, writer: BlockWriter) -> None:
        """Append what reads the layer's input, before attention."""

    def prepare(self, writer: BlockWriter) -> None:
        """Append what needs the residual stream that the FFN's norm read; in a parallel layer, attention
        follows."""

    def choose(self, writer: BlockWriter, first: int) -> int:
        """Append the choice of experts, where there are some. Returns the operation after it, else
        ``first``: from there on, a hot side can work beside."""

    def write(self, writer: BlockWriter, buffers: Buffers, output: FFNOutput) -> None:
        """Append the operations of what is here."""

    def works(self, count: int) -> bool:
        """Whether one of ``count`` tokens, whose experts are chosen, needs something that is here."""

    def scores(self, count: int) -> tuple[Floats, Floats]:
        """Buffers for the scores of ``count`` tokens by a router on the hot device: of experts, and
        of the shared one."""

    def hot_routes(self, count: int) -> list[Route]:
        """What ``count`` tokens take of a hot side's part."""


@dataclass(frozen=True)
class Part:
    """What of a layer's FFN is laid out, for up to ``tokens`` tokens at a time: all but the first
    ``hot_neurons``, which the hot device computes, and in mode predicted names, too, where they are
    ``named`` there. ``alone``: no hot device takes part, so that the result may go into the residual stream
    at once. ``observed`` and ``thresholds``: of a source model, what counts, and what is left out.
    ``packed``: what other layouts of the model share. ``on_disk``: where it is read from."""

    mode: str
    tokens: int
    packed: PackedWeights
    hot_neurons: int = 0
    named: bool = False
    alone: bool = False
    observed: LayerCounters | None = None
    thresholds: FactorThresholds | None = None
    on_disk: LayersOnDisk | NeuronsOnDisk | None = None


class Plain:
    """A dense FFN without a predictor: one expert that every token takes, with weight one."""

    work = "cold"
    in_rows = True

    def bytes_per_token(self, computed: Computed) -> float:
        """Nothing."""
        return 0.0

    def bytes_per_pass(self, computed: Computed) -> float:
        """What a token touches."""
        return self.bytes_per_token(computed)

    def before(self, writer: BlockWriter) -> None:
        """Append nothing."""

    def prepare(self, writer: BlockWriter) -> None:
        """Append nothing."""

    def choose(self, writer: BlockWriter, first: int) -> int:
        """Append nothing."""
        return first

    def works(self, count: int) -> bool:
        """Every token needs every neuron."""
        return True

    def scores(self, count: int) -> tuple[Floats, Floats]:
        """There is no router."""
        raise AssertionError("a dense FFN has no experts to choose")

    def hot_routes(self, count: int) -> list[Route]:
        """All tokens take all of it."""
        return [Route(SHARED, range(count), [1.0] * count)]
