"""Everything that is placed on a device, put together from a split file."""

from collections.abc import Callable
from functools import cached_property, partial

import torch

from powerinfer_formats.split import SplitLayer
from powerinfer_formats.split_predictors import SplitLowRank
from powerinfer_kernels import RowType
from powerinfer_kernels.triton_layout import PLANAR_TYPES, SPLIT_ROWS
from powerinfer_tools.engine.hot.backend import Backend, Exchange, FFNsApart
from powerinfer_tools.engine.hot.devices import Device
from powerinfer_tools.engine.hot.expert_parts import ExpertParts, chosen, chunk_floats, routers_of
from powerinfer_tools.engine.hot.experts import HotExperts, WholeFFN
from powerinfer_tools.engine.hot.head import HotHead
from powerinfer_tools.engine.hot.hot_blocks import HotBlocks, head
from powerinfer_tools.engine.hot.hot_ffn import HotFFN, Inputs, Scratch
from powerinfer_tools.engine.hot.layer_steps import HotLayer, Landing, StreamMemory
from powerinfer_tools.engine.hot.loading import Arena, Form, unpacked_values
from powerinfer_tools.engine.hot.placed import Named, Placed
from powerinfer_tools.engine.hot.placement import HotUnits, Workload, experts_of
from powerinfer_tools.engine.hot.prediction import HotPredictor
from powerinfer_tools.engine.hot.predictor_units import PredictorParts, reads_floats, reads_stream
from powerinfer_tools.engine.hot.stream import HotStream
from powerinfer_tools.model.counting import HEAD_ROWS
from powerinfer_tools.model.device_memory import CHUNK_ROWS, rows_at_once
from powerinfer_tools.model.layer_weights import AttentionWeights
from powerinfer_tools.model.loading import Model
from powerinfer_tools.model.tensors import Weight

Tensor = torch.Tensor
#: Tokens of a batch that takes the same kernels as a large one.
_REHEARSED = 2
#: Bytes of float32 rows that the CPU device may hold.
UNPACKED_LIMIT = 2 << 30


def assemble(
    model: Model,
    units: HotUnits,
    device: Device,
    work: Workload,
    *,
    fused: bool,
    rehearse: Callable[[Callable[[], None]], None] | None = None,
) -> tuple[Backend, list[str]]:
    """``units`` on ``device``, in one block of its memory, with Triton kernels if ``fused`` and the row type
    has them. Second, the row types without such kernels. ``rehearse`` gets all the work, with a small batch,
    before any of it is recorded. Raises OutOfDeviceMemory."""
    values = unpacked_values(_neuron_layers(model), units.neurons, _matrices(model, units))
    unpack = device.free_bytes() is None and 4 * values <= UNPACKED_LIMIT
    arena = Arena()
    form = Form(arena, fused=fused, unpack=unpack)
    _Parts(model, units, work, form, device).take_all()
    arena.fill(device.allocate(arena.nbytes))
    parts = _Parts(model, units, work, form, device)
    parts.take_all()
    if rehearse is not None:
        rehearse(lambda: parts.backend().prepare(min(_REHEARSED, work.tokens)))
    return parts.backend(), sorted(form.not_fused)


def rest_floats(neurons: int, width: int) -> int:
    """Floats for the hidden values of a token, to whole lines, and partial sums of SPLIT_ROWS rows each."""
    return -(-neurons // 64) * 64 + -(-neurons // SPLIT_ROWS) * width


def _neuron_layers(model: Model) -> list[SplitLayer | None]:
    """The neurons of each layer; None where the units are experts, or there is no FFN."""
    ffns = (layer.feeds for layer in model.layers)
    return [ffn if isinstance(ffn, SplitLayer) else None for ffn in ffns]


def _matrices(model: Model, units: HotUnits) -> list[Weight]:
    """All matrices that are placed as a whole."""
    moved = [layer for layer, on_device in zip(model.layers, units.attention, strict=True) if on_device]
    matrices = [matrix for layer in moved for matrix in _attention_matrices(layer.attention)]
    for layer, counts, on_device in zip(experts_of(model), units.experts, units.attention, strict=True):
        matrices += [matrix for ffn in chosen(layer, counts).values() for matrix in ffn.matrices]
        matrices += routers_of(layer) if on_device else []
    return [*matrices, model.head] if units.head else matrices


def _all_fused(model: Model, units: HotUnits) -> bool:
    """Whether no row takes more memory than it has when it is unpacked."""
    pairs = zip(_neuron_layers(model), units.neurons, strict=True)
    layers = [layer for layer, count in pairs if layer is not None and count]
    kinds = {RowType(layer.type_of(kind)) for layer in layers for kind in layer.kinds}
    kinds |= {matrix.row_type for matrix in _matrices(model, units)}
    kinds |= {
        RowType(kind)
        for layer in layers
        if units.names(layer.index) and isinstance(layer.predictor, SplitLowRank)
        for kind in layer.predictor.types
    }
    return kinds <= {*PLANAR_TYPES, RowType.F32}


def _attention_matrices(w: AttentionWeights) -> list[Weight]:
    return [one for one in (w.query, w.key, w.value, w.output) if one is not None]


class _Parts:
    """All pieces, each taken from the form's memory once."""

    def __init__(self, model: Model, units: HotUnits, work: Workload, form: Form, device: Device) -> None:
        self.model, self.units, self.work, self.form, self.device = model, units, work, form, device
        self.hyper, self.memory, self.layers = model.hyper, form.memory, _neuron_layers(model)

    def take_all(self) -> None:
        """Take the memory of everything, in a fixed order."""
        _ = self.ffns, self.scratch, self.predictors, self.exchanged
        self.predictor_parts.take_shared()
        if self.experts is not None:
            self.experts.take_all()
        for layer in self.streamed if any(self.units.attention) else ():
            if layer is not None:
                self._take_layer(layer)
        if self.units.head:
            self.head.write(self.head.rows)

    def _take_layer(self, layer: HotLayer) -> None:
        """Take the memory that the layer's blocks request when they are written."""
        x, hot, cold = self.stream_floats[1]
        layer.blocks.mix(x)
        if layer.ffn is not None:
            layer.blocks.ffn_input(x)
            layer.blocks.merge(x, [hot, cold])

    def backend(self) -> Backend:
        """The whole."""
        exchange, rounded = self._exchange()
        apart = [
            None if on_device else ffn for on_device, ffn in zip(self.units.attention, self.ffns, strict=True)
        ]
        stream = None
        hot_head = self.head if self.units.head else None
        if any(self.units.attention):
            memory, parallel = self._stream_memory(), self.model.hyper.parallel
            stream = HotStream(self.device, self.streamed, memory, hot_head, parallel=parallel)
        predictors = [
            None if on_device else predictor
            for on_device, predictor in zip(self.units.attention, self.predictors, strict=True)
        ]
        parts = self.predictor_parts
        ffns = FFNsApart(
            apart,
            exchange,
            self.scratch,
            rounded,
            predictors,
            parts.naming,
            parts.stream_ends(self._used(on_device=False)),
            self.experts.dispatch if self.experts else None,
        )
        return Backend(self.device, ffns, stream, hot_head)

    @cached_property
    def experts(self) -> ExpertParts | None:
        """Of a model that has some."""
        layers = experts_of(self.model)
        if self.hyper.routing is None:
            return None
        return ExpertParts(
            layers, self.hyper, self.units, self.work.tokens, self.form, self.device, self.chunk
        )

    @cached_property
    def ffns(self) -> list[HotFFN | WholeFFN | HotExperts | None]:
        """The hot neurons, or experts, of each layer."""
        activation = (self.hyper.activation, self.hyper.activation_cut)
        experts = [None] * self.hyper.layers if self.experts is None else self.experts.experts
        return [
            self.form.ffn(layer, count, activation) if layer is not None and count else others
            for layer, count, others in zip(self.layers, self.units.neurons, experts, strict=True)
        ]

    @cached_property
    def predictor_parts(self) -> PredictorParts:
        """What predictors share."""
        named = self._naming
        tokens, checks = self.work.tokens, self.work.check_recall
        return PredictorParts(named, self.hyper, tokens, self.form, self.device, self.chunk, checks=checks)

    @cached_property
    def predictors(self) -> list[HotPredictor | None]:
        """The predictor of each layer that has it here."""
        made: list[HotPredictor | None] = [None] * self.hyper.layers
        for layer in self._naming:
            made[layer.index] = self.predictor_parts.predictor(layer, self.units.neurons[layer.index])
        return made

    @property
    def _naming(self) -> list[SplitLayer]:
        """The layers whose predictor is here."""
        return [layer for layer in self.layers if layer is not None and self.units.names(layer.index)]

    @cached_property
    def chunk(self) -> Tensor:
        """Flat space for a chunk of unpacked rows of any matrix."""
        width, routing = self.hyper.width, self.hyper.routing
        least = min(self._rows_at_once, max(self.units.neurons)) * width
        if routing is not None and any(self.units.experts):
            least = max(least, chunk_floats(experts_of(self.model), routing.used))
        for predictor in (layer.predictor for layer in self._naming):
            rank = predictor.rank if isinstance(predictor, SplitLowRank) else 0
            least = max(least, CHUNK_ROWS * max(width, rank))
        return self.memory.floats(max(least, self._rows_at_once * max(self._chunks, default=0) // CHUNK_ROWS))

    @property
    def _chunks(self) -> list[int]:
        """Values of the chunks of rows that are counted for attention and the head."""
        widest = max(self.hyper.width, self.hyper.query_width)
        units = ((any(self.units.attention), widest), (self.units.head, self.hyper.width))
        return [CHUNK_ROWS * columns for on_device, columns in units if on_device]

    @cached_property
    def _rows_at_once(self) -> int:
        """Neurons, and rows of a matrix, that are unpacked at a time."""
        if not self.form.fused or not _all_fused(self.model, self.units):
            return CHUNK_ROWS
        neurons = min(CHUNK_ROWS, max(self.units.neurons))
        return rows_at_once([neurons * self.hyper.width, *self._chunks], self.work.tokens)

    @cached_property
    def scratch(self) -> Scratch:
        """What the neurons of one layer need while they are computed."""
        most, tokens, width = max(self.units.neurons), self.work.tokens, self.hyper.width
        chunk = min(self._rows_at_once, most)
        gate, up = (self.memory.floats(tokens * chunk) for _ in range(2))
        rest = self.memory.floats(rest_floats(most, width))
        return Scratch(self.chunk[: chunk * width].view(chunk, width), gate, up, rest)

    @cached_property
    def exchanged(self) -> list[Tensor]:
        """The device's buffers for the exchange in layers whose attention the host computes: the output, and
        the input in one form or in both."""
        kinds = self._float_rows(on_device=False)
        tokens = self.work.tokens if kinds else 0
        return [self.memory.floats(tokens, self.hyper.width) for _ in range(1 + max(1, len(kinds)))]

    @cached_property
    def streamed(self) -> list[HotLayer | None]:
        """The layers whose attention is here."""
        return [self._hot_layer(i) if on_device else None for i, on_device in enumerate(self.units.attention)]

    @cached_property
    def placed(self) -> Placed:
        """Weights and caches of all blocks."""
        return Placed(self.model, self.form, self.work, self.chunk)

    @cached_property
    def named(self) -> Named:
        """Buffers of the layers' blocks."""
        return Named(self.memory, self.work.tokens, fused=self.form.fused)

    @cached_property
    def stream_floats(self) -> tuple[Inputs, list[Tensor]]:
        """The FFN's input; the stream, and the sums of both sides."""
        width, rounded = self.hyper.width, False in self._float_rows(on_device=True)
        inputs = self.named.inputs("normed", width, rounded=rounded)
        return inputs, [self.named.floats(name, width) for name in ("x", "hot", "cold")]

    @cached_property
    def head(self) -> HotHead:
        """The output norm and the head."""
        hyper, model = self.hyper, self.model
        named = Named(self.memory, min(HEAD_ROWS, self.work.tokens), fused=self.form.fused)
        staged = 0 if self.memory.counting else named.rows
        return HotHead(
            write=partial(head, model, self.placed, named),
            rows=named.floats("head_input", hyper.width),
            logits=named.floats("logits", hyper.vocabulary),
            landing=self.device.staging(staged, hyper.width),
            host=self.device.staging(staged, hyper.vocabulary),
        )

    def _float_rows(self, *, on_device: bool) -> set[bool]:
        """Whether the readers of the FFN's input are of float types, in layers whose attention is on the
        device (or is not). Both answers if some readers are and some are not; none if there are no
        readers."""
        kinds = set[bool]() if self.experts is None else self.experts.float_rows(on_device=on_device)
        layers = self._used(on_device=on_device)
        kinds |= {RowType(layer.type_of(kind)).is_float for layer in layers for kind in layer.kinds[:-1]}
        predictors = (layer.predictor for layer in layers if self.units.names(layer.index))
        return kinds | {reads_floats(predictor) for predictor in predictors if predictor is not None}

    def _used(self, *, on_device: bool) -> list[SplitLayer]:
        """The layers with hot neurons whose attention is here (or is not)."""
        units = zip(self.layers, self.units.neurons, self.units.attention, strict=True)
        return [layer for layer, count, moved in units if layer is not None and count and moved == on_device]

    def _exchange(self) -> tuple[Exchange, bool]:
        out, *inputs = self.exchanged
        tokens = len(out)
        staging = [self.device.staging(tokens, self.hyper.width) for _ in inputs]
        rounded = False in self._float_rows(on_device=False)
        host_out = self.device.staging(tokens, self.hyper.width)
        reached = [self.form.window(self.device, end) for end in (*staging, host_out)]
        windows = [end for end in reached if end is not None]
        reach = len(windows) == len(reached)
        exchange = Exchange(
            Inputs(staging[0], staging[-1]),
            host_out,
            Inputs(inputs[0], inputs[-1]),
            out,
            Inputs(windows[0], windows[-2]) if reach else None,
            windows[-1] if reach else None,
        )
        return exchange, rounded

    def _hot_layer(self, index: int) -> HotLayer:
        ffn, reads, rounds = self.ffns[index], False, self.stream_floats[0].apart
        layer = self.layers[index]
        if layer is None:
            cold = self.experts is not None and self.experts.cold(index)
        else:
            cold = not isinstance(ffn, HotFFN) or ffn.neurons < layer.neurons
            reads = reads_stream(layer.predictor) and not self.units.names(index)
        return HotLayer(
            blocks=HotBlocks(self.model, index, self.placed, self.named, rounds),
            ffn=ffn,
            predictor=self.predictors[index],
            router=self.experts.routers[index] if self.experts else None,
            cold=cold,
            shows_stream=reads,
        )

    def _stream_memory(self) -> StreamMemory:
        normed, (x, hot, cold) = self.stream_floats
        tokens = self.work.tokens
        ends = [self.device.staging(tokens, self.hyper.width) for _ in range(3)]
        places = self.device.staging(2 * tokens).view(torch.int64)
        places.zero_()  # the recorded token is at the first position
        host = [*ends, places]
        reached = [self.form.window(self.device, end) for end in host]
        windows = [end for end in reached if end is not None]
        return StreamMemory(
            x,
            normed,
            hot,
            cold,
            self.placed.positions,
            self.scratch,
            Landing(*host),
            Landing(*windows) if len(windows) == len(host) else None,
            self._float_rows(on_device=True) == {False},
            self.predictor_parts.naming,
            self.experts.dispatch if self.experts else None,
        )
