"""Neurons of a sparse model larger than memory: the records of a split file stay on disk, and those of the
busiest neurons are in memory as well. The others are read when a token needs them, one by one or in runs of
neighbours.

A split file stores a layer's neurons hottest first, so the beginning of each layer stays in memory and takes
most of it. The rest of the memory follows use. The neurons that a token needs are known exactly before a row
is read, from its gates (gate-first) or from its predictor, and the sums equal those of the model in memory,
bit for bit. In mode predicted, the next layer's predictor is applied to the present residual stream, and the
neurons that it names are read meanwhile, if cores are free for that. Prompts of more than eight tokens need
nearly all neurons of a layer, and read them.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from powerinfer_formats.split import SplitLayer
from powerinfer_kernels import (
    Bundle,
    KernelError,
    LayerOfRecords,
    Pool,
    Records,
    RecordsOf,
    physical_cores,
)
from powerinfer_kernels.records import PAGE, read_bytes
from powerinfer_tools.engine.blocks import BlockWriter
from powerinfer_tools.engine.modes import layer_modes
from powerinfer_tools.engine.predictor_programs import Predictor, lay_out
from powerinfer_tools.engine.values import Value
from powerinfer_tools.engine.weights_on_disk import Budget, WeightsOnDisk
from powerinfer_tools.errors import ModelError
from powerinfer_tools.model.loading import Model

#: Memory for what is being read, in reads of the largest size: some 128 single neurons.
_UNDER_WAY = 8
#: Share of the memory for records that stay; the rest follows use. Where neurons fire independently of the
#: token before, as in synthetic models, all should stay; a page kept for one record costs twice its bytes.
_STAYS = 0.9
#: Memory in addition to the largest layer, which a prompt needs at once.
_SLACK = 2 << 20
#: Pieces of the gates of neurons that are not in memory, and the rows that pieces are made of.
_PIECES, _TILE = 4, 16
#: Single records that are read to see how fast the disk is.
_TRIED = 512


class NeuronsOnDisk(WeightsOnDisk):
    """The rows of the neurons of all layers that are computed by single neurons in ``mode`` (None: the file's
    mode)."""

    what = "neurons"

    def __init__(self, model: Model, pool: Pool, mode: str | None) -> None:
        self._modes = layer_modes(model, mode)
        super().__init__(model, pool)

    def _lay_out(self) -> Records:
        self._records = Records()
        self._layers: list[SplitLayer] = []
        self._bundles: list[Bundle] = []
        self._places: list[tuple[int, int]] = []
        self._predictors: dict[int, Predictor] = {}
        self._share = 0.0
        for layer, mode in zip(self.model.layers, self._modes, strict=True):
            ffn = layer.feeds
            if not isinstance(ffn, SplitLayer):
                continue
            self._places.append(self._place(ffn, mode))
            self._layers.append(ffn)
            self._bundles.append(Bundle.absent(self._pool, ffn.neurons, ffn.width, _types(ffn, mode)))
        return self._records

    def _place(self, layer: SplitLayer, mode: str) -> tuple[int, int]:
        """The file that holds the records of ``layer``, and the offset of their first byte."""
        path = self.model.path
        if mode == "dense":
            raise ModelError(
                f"{path}: layer {layer.index} is computed dense, so a token takes all of its neurons; run "
                "the source with --ram, which reads whole layers, or ask for --mode gate-first"
            )
        if layer.hot_neurons:
            raise ModelError(
                f"{path}: {layer.hot_neurons} neurons of layer {layer.index} lie apart from the others, for "
                "an accelerator; neurons are read from disk of a file that was planned without one"
            )
        place = self.model.source.place_of(layer.cold)
        if place is None:
            raise ModelError(f"{path}: the neurons of layer {layer.index} are not in the file one by one")
        return place

    def bundle(self, index: int) -> Bundle:
        """The rows of layer ``index``."""
        return self._bundles[self._at(index)]

    def records(self, index: int) -> RecordsOf:
        """The records of layer ``index``, by which its rows are brought into memory."""
        return RecordsOf(self._records, self._at(index))

    def predictor(self, index: int, tokens: int) -> Predictor | None:
        """The predictor of layer ``index``, for up to ``tokens`` at a time, if it has one."""
        layer = self._layers[self._at(index)]
        if index not in self._predictors and layer.predictor is not None:
            self._predictors[index] = lay_out(layer.predictor, self._pool, 0, layer.width, tokens)
        return self._predictors.get(index)

    def foresees(self, index: int) -> bool:
        """Whether neurons of layer ``index`` are read ahead. This requires that the layer is computed with a
        predictor, which is then in memory, and that readers have cores that do not compute. Without such
        cores, reading ahead was slower."""
        return self._modes[index] == "predicted" and spare_cores(self._pool) > 0

    def after(self, index: int) -> int | None:
        """The next layer whose neurons are on disk."""
        later = (layer.index for layer in self._layers if layer.index > index)
        return next(later, None)

    def _at(self, index: int) -> int:
        return next(at for at, layer in enumerate(self._layers) if layer.index == index)

    @property
    def whole_bytes(self) -> int:
        """See :class:`WeightsOnDisk`."""
        return sum(bundle.nbytes for bundle in self._bundles)

    @property
    def readers_bytes(self) -> int:
        """See :class:`WeightsOnDisk`."""
        return _UNDER_WAY * max(read_bytes(layer.layout.record_bytes) for layer in self._layers)

    @property
    def _largest(self) -> int:
        return max(bundle.nbytes for bundle in self._bundles) + _SLACK

    def suffices(self, nbytes: int, tokens: int) -> bool:
        """The largest layer has to fit, whatever the number of tokens."""
        return nbytes >= self._largest

    def least_bytes(self, tokens: int) -> int:
        """See :class:`WeightsOnDisk`."""
        return self._largest + self.readers_bytes

    def _stays(self, nbytes: int, *, static: bool) -> float:
        """The share of each layer's neurons that stay with ``nbytes``."""
        left = max(0, nbytes - _SLACK)
        return min(1.0, left * (1 if static else _STAYS) / self.whole_bytes)

    def prepare(self, nbytes: int) -> None:
        """See :class:`WeightsOnDisk`."""
        self._share = min(1.0, nbytes / self.whole_bytes)

    def resident(self, index: int) -> int:
        """How many of the first neurons of layer ``index`` are in memory most of the time."""
        return int(self._layers[self._at(index)].neurons * self._share)

    def notice(self, nbytes: int) -> str:
        """See :class:`WeightsOnDisk`."""
        share = min(1.0, nbytes / self.whole_bytes)
        return (
            f"{share:.0%} of the neurons are in memory at a time, the busiest first, the others are read "
            "from disk as they are needed"
        )

    def open(self, budget: Budget) -> None:
        """See :class:`WeightsOnDisk`."""
        nbytes = budget.nbytes - self.readers_bytes
        if not self.suffices(nbytes, budget.batch):
            raise ModelError(self.too_little(budget))
        stays = self._stays(nbytes, static=budget.static)
        fixed = [int(layer.neurons * stays) for layer in self._layers]
        layers = [
            LayerOfRecords(bundle, *place, layer.layout.record_bytes, _rows(layer, bundle), some)
            for layer, bundle, place, some in zip(
                self._layers, self._bundles, self._places, fixed, strict=True
            )
        ]
        self._records.open(self._files, layers, nbytes // PAGE, self.readers_bytes)
        self._is_open = True
        self.drop_pages()
        share = min(1.0, (nbytes - _SLACK) / self.whole_bytes)
        resident = [
            max(some, int(layer.neurons * share)) for some, layer in zip(fixed, self._layers, strict=True)
        ]
        try:
            for at, count in enumerate(resident):
                self._records.load(self._pool, at, np.arange(count, dtype=np.int32))
            self.expectation = self._expected(resident, budget.use)
        except KernelError:
            raise ModelError(self.problem() or "neurons cannot be read") from None
        self._records.reset()

    def _expected(self, resident: Sequence[int], use: Sequence[np.ndarray] | None) -> str:
        """How fast the disk reads single neurons, measured by reading some, and the speed this allows."""
        tried, started = 0, time.perf_counter()
        for at, (count, layer) in enumerate(zip(resident, self._layers, strict=True)):
            some = np.unique(
                np.linspace(count, layer.neurons - 1, _TRIED // len(resident) + 1).astype(np.int32)
            )
            if count < layer.neurons:
                self._records.load(self._pool, at, some)
                tried += len(some)
        if not tried:
            return "all neurons are in memory"
        rate = tried / max(time.perf_counter() - started, 1e-9)
        said = f"the disk brings {rate:,.0f} single neurons a second"
        if not self._records.asynchronous:
            said += ", while nothing is computed: asynchronous reads cannot be had here"
        if use is None:
            return f"{said}; how many a token takes is not known without a profile"
        missing = sum(float(shares[count:].sum()) for count, shares in zip(resident, use, strict=True))
        if missing * 10 < 1:
            return f"{said}; by the profile tokens take hardly any that are not in memory"
        return f"{said}; by the profile a token takes {missing:,.0f}: at most {rate / missing:.3g} tok/s"


def spare_cores(pool: Pool) -> int:
    """Cores that this process may use and that ``pool`` does not use."""
    return max(0, physical_cores() - pool.threads)


@dataclass(frozen=True)
class OfLayer:
    """Layer ``index`` of the layers on ``disk``, for passes of up to ``tokens``: a
    :class:`~powerinfer_tools.engine.blocks.RowsOnDisk`."""

    disk: NeuronsOnDisk
    index: int
    tokens: int

    @property
    def records(self) -> RecordsOf:
        """The layer."""
        return self.disk.records(self.index)

    @property
    def pieces(self) -> list[tuple[int, int]]:
        """See :class:`~powerinfer_tools.engine.blocks.RowsOnDisk`."""
        return gate_pieces(self.disk.bundle(self.index).rows, self.disk.resident(self.index))

    def write_ahead(self, writer: BlockWriter) -> None:
        """Append the operations that request the neurons of the next layer, if it has a predictor. The
        predictor names them by the present residual stream, before this layer's sum is added."""
        index = self.disk.after(self.index)
        if index is None or not self.disk.foresees(index):
            return
        predictor = self.disk.predictor(index, self.tokens)
        assert predictor is not None
        writer.label("predictor")
        ops, source, norm = writer.ops, Value(writer.buffers.x), self.disk.model.layers[index].ffn_norm
        if norm is not None:
            source = ops.norm("normed_ahead", source, norm, writer.eps)
        if predictor.quantized:
            ops.round(source.floats)
        buffers = replace(
            writer.buffers,
            normed=source.floats,
            normed_acts=ops.rounded(source.floats),
            residual_acts=ops.rounded(writer.buffers.x),
        )
        neurons = len(predictor.threshold)
        scores = writer.buffers.scratch.named("scores_ahead", neurons)
        predictor.prepare(writer.builder, buffers)
        predictor.write(writer.builder, scores)
        of = self.disk.records(index)
        writer.builder.fetch_records(of, scores, predictor.threshold, neurons=neurons, when="perhaps")


def gate_pieces(neurons: int, resident: int) -> list[tuple[int, int]]:
    """The first and the last row of each piece in which gates are computed if all but the first ``resident``
    neurons are on disk: the pieces of the others, busiest first, then those neurons. A piece begins at a
    multiple of 16."""
    first = min(resident, neurons - 1) // _TILE * _TILE
    step = -(-(neurons - first) // (_PIECES * _TILE)) * _TILE
    pieces = [(at, min(at + step, neurons)) for at in range(first, neurons, step)]
    return [*pieces, (0, first)] if first else pieces


def _kinds(layer: SplitLayer, mode: str) -> tuple[str | None, ...]:
    """The kinds of rows that serve as gate, up and down in the bundle. The rows that feed the activation are
    the bundle's gate rows, whatever the file calls them."""
    gate, *up, down = layer.kinds
    whole = (gate, up[0] if up else None, down)
    if mode == "gate-first":
        return (None, *whole[1:])
    if mode == "thresholded":
        assert layer.threshold is not None
        return tuple(None if kind == layer.threshold.factor else kind for kind in whole)
    return whole


def _types(layer: SplitLayer, mode: str) -> tuple[int | None, int | None, int | None]:
    gate, up, down = (None if kind is None else int(layer.type_of(kind)) for kind in _kinds(layer, mode))
    return gate, up, down


def _rows(layer: SplitLayer, bundle: Bundle) -> tuple[int | None, int | None, int | None]:
    """The places of the rows of ``bundle`` in a record."""
    first, *rest = layer.layout.offsets
    every = (first, rest[0] if len(rest) == 2 else None, rest[-1])
    gate, up, down = (
        None if kind is None else place for kind, place in zip(bundle.types, every, strict=True)
    )
    return gate, up, down
