"""All layers of a model as one program, with the points where a hot device joins in."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from powerinfer_kernels import Matrix, Pool, ProgramBuilder
from powerinfer_tools.engine.blocks import BlockWriter, FFNOutput, pack
from powerinfer_tools.engine.buffers import allocate
from powerinfer_tools.engine.caches import allocate_caches, require_kv_type
from powerinfer_tools.engine.ffn import (
    ColdFFN,
    Computed,
    load_cold_ffn,
    predictor_thresholds,
    with_thresholds,
    write_recall_check,
)
from powerinfer_tools.engine.hot_steps import HotSteps
from powerinfer_tools.engine.memory import kv_bytes_per_position, require_memory
from powerinfer_tools.engine.modes import layer_modes
from powerinfer_tools.engine.recall import RecallCheck, recall_of
from powerinfer_tools.engine.rotary import layer_tables
from powerinfer_tools.engine.routed import RoutedFFN, routed_buffers
from powerinfer_tools.engine.stack_options import StackOptions
from powerinfer_tools.engine.timeline import Timeline
from powerinfer_tools.errors import ModelError
from powerinfer_tools.ffn_weights import ExpertsFFN
from powerinfer_tools.hardware.detect import available_ram_bytes
from powerinfer_tools.hot import HotSide, open_hot_side
from powerinfer_tools.hot.expert_routes import HotExpertSide, open_hot_experts
from powerinfer_tools.hot.placement import Workload
from powerinfer_tools.model import LayerWeights, Model

Floats = npt.NDArray[np.float32]
#: What looks on: layer, normalised FFN input, act(gate)·up.
Watch = Callable[[int, Floats, Floats], None]


@dataclass(frozen=True)
class _Stop:
    """Operations [ready, needed) of one layer that are not simply run one after the other: ``work`` runs
    them, called with the number of tokens and their position."""

    ready: int
    needed: int
    work: Callable[[int, int], None]


class LayerStack:
    """Embedding and layers: tokens in, residual stream ``x`` out."""

    def __init__(self, model: Model, pool: Pool, options: StackOptions) -> None:
        self.model, self._pool, self.kv_type = model, pool, options.kv_type
        require_kv_type(model, options.kv_type)
        self._modes = layer_modes(model, options.mode)
        predicted = frozenset(i for i, mode in enumerate(self._modes) if mode == "predicted")
        work = Workload(options.batch, options.context, options.kv_type, predicted)
        self._hot: HotSide | None
        self._hot_experts: HotExpertSide | None
        self._hot, self._hot_experts, self._notices = _open_hot(model, options, work)
        #: What each forward pass is recorded in, if at all.
        self.timeline: Timeline | None = None
        self.device = options.device if self._hot or self._hot_experts else "none"
        self._buffers = allocate(
            model.spec,
            model.hyper,
            options.batch,
            hot=self._hot is not None or self._hot_experts is not None,
            scores="predicted" in self._modes or options.thresholds is not None,
        )
        here = [not self._attention_there(index) for index in range(model.hyper.layers)]
        self._caches = allocate_caches(model, options.context, options.kv_type, here)
        builder = ProgramBuilder(options.batch)
        self._writer = BlockWriter(model, pool, builder, self._buffers)
        self._tables = layer_tables(model.hyper, options.context, model.rope_factors)
        self._stops: list[_Stop] = []
        self._away = False  # whether, at the operation being written, the residual stream is on the device
        self._routed = routed_buffers(model.hyper, options.batch)
        self._ffn_ends: list[int] = []
        self._cold: list[ColdFFN | RoutedFFN] = []
        self._observed, self._thresholds = options.observed, options.thresholds
        self._check_recall = options.check_recall
        self._checks: list[RecallCheck] = []
        self._checked: list[int] = []
        self._tokens = 0
        self._beside = HotSteps(self._hot, self._buffers, self) if self._hot else None
        self._write()
        self._length = builder.mark()
        self._program = builder.build()
        #: The head's rows; None where the hot device has them.
        self.head_matrix: Matrix | None = None if self.has_hot_head else pack(pool, model.head)

    @property
    def x(self) -> Floats:
        """The residual stream, float32 (batch, width); row t is the t-th token of the last forward."""
        return self._buffers.x

    @property
    def modes(self) -> tuple[str, ...]:
        """The mode of each layer."""
        return self._modes

    @property
    def mode(self) -> str:
        """The mode of every layer, or "mixed"."""
        return self._modes[0] if len(set(self._modes)) == 1 else "mixed"

    @property
    def cache_nbytes(self) -> int:
        """Size of the KV cache outside the hot device, in bytes."""
        return sum(cache.nbytes for cache in self._caches if cache is not None)

    @property
    def weight_bytes(self) -> int:
        """Size of all weights as laid out for the kernels, in bytes."""
        return self._writer.weight_bytes + sum(ffn.nbytes for ffn in self._cold) + self._head_bytes

    @property
    def has_hot_head(self) -> bool:
        """Whether the hot device computes the logits."""
        return self._hot is not None and self._hot.has_head

    @property
    def notices(self) -> Sequence[str]:
        """What the hot side had to do otherwise than asked, in words for the user."""
        side = self._hot or self._hot_experts
        return side.notices if side else self._notices

    @property
    def vram_peak_bytes(self) -> int | None:
        """The most that the hot device held; None where it is not counted."""
        side = self._hot or self._hot_experts
        return side.peak_bytes if side else None

    @property
    def vram_bytes(self) -> int:
        """What the hot device holds, in bytes."""
        side = self._hot or self._hot_experts
        return side.nbytes if side else 0

    @property
    def scratch_bytes(self) -> int:
        """Size of activations and tables in bytes."""
        tables = {id(table): table.nbytes for table in self._tables}
        routed = self._routed.nbytes if self._routed else 0
        return self._buffers.nbytes + routed + sum(tables.values())

    def forward(self, tokens: Sequence[int], position: int) -> int:
        """Run all layers over ``tokens`` at ``position``; returns their number."""
        count = len(tokens)
        vocabulary = self.model.hyper.vocabulary
        for token in tokens:
            if not 0 <= token < vocabulary:
                raise ModelError(f"token id {token} is outside the vocabulary of {vocabulary}")
        self._place(tokens, position)
        first = 0
        for stop in self._stops:
            self._run_parts(first, stop.ready, count, position)
            stop.work(count, position)
            first = stop.needed
        self._run_parts(first, self._length, count, position)
        self._tokens += count
        if self._beside:
            self._beside.keep_spans()
        return count

    def hot_logits(self, first: int, last: int) -> Floats:
        """Logits (rows, vocabulary) of the tokens ``first`` to ``last`` of the last forward, by the hot
        device; valid until the next call."""
        assert self._beside is not None
        return self._beside.logits(first, last, stayed=self._away)

    def forward_watched(self, tokens: Sequence[int], position: int, watch: Watch) -> int:
        """:meth:`forward` of a source model, calling ``watch`` after every FFN with its layer, its normalised
        input (tokens, width) and act(gate)·up (tokens, neurons): views, valid during the call."""
        assert self.model.is_source
        count, first = len(tokens), 0
        self._place(tokens, position)
        for layer, end in enumerate(self._ffn_ends):
            self.run(first, end, count, position)
            watch(layer, self._buffers.normed[:count], self._buffers.gate[:count])
            first = end
        self.run(first, self._length, count, position)
        return count

    def known_factors(self, tokens: int) -> tuple[Floats, Floats]:
        """act(gate) and up of the FFN that ran last, (tokens, neurons) each: views, for who looks on while a
        source model runs with thresholds."""
        assert self._buffers.scores is not None
        return self._buffers.scores[:tokens], self._buffers.up[:tokens]

    def set_thresholds(self, layer: int, values: Floats | None) -> None:
        """Replace the thresholds (neurons) of the predictor of ``layer``, where it has one, from the next run
        on; None names every neuron, which is exact."""
        held = predictor_thresholds(self._cold[layer])
        if held is not None:
            held[:] = -np.inf if values is None else values

    def cache_bytes_read(self, position: int) -> int:
        """Bytes of KV cache that decoding at ``position`` reads."""
        hyper = self.model.hyper
        per_position = kv_bytes_per_position(hyper, self.kv_type)
        windows = (hyper.window if local else position for local in hyper.local_layers)
        return round(sum(per_position * min(position, window) for window in windows))

    def weight_bytes_per_token(self) -> float:
        """Mean bytes of weights that one decoded token touches, with the density seen so far."""
        program, total = self._program, self._program.total_neurons()
        computed = Computed(1, 1)
        if total:
            computed = Computed(program.active_neurons() / total, program.confirmed_neurons() / total)
        tables = (self.model.embedding, self.model.positions)
        embedded = sum(table.nbytes // table.rows for table in tables if table is not None)
        ffn = sum(layer.bytes_per_token(computed) for layer in self._cold)
        # Of experts, those of both sides that a token takes are in ``ffn`` already.
        hot = self._hot.weight_bytes if self._hot else 0
        return self._writer.weight_bytes + self._head_bytes + embedded + ffn + hot

    def weight_bytes_per_pass(self) -> float:
        """Mean bytes of weights that a forward pass touched so far, whatever its number of tokens: an expert
        counts once where some token of a batch takes it."""
        routed = [ffn for ffn in self._cold if isinstance(ffn, RoutedFFN)]
        more = sum(ffn.bytes_per_pass() - ffn.bytes_per_token(Computed(1, 1)) for ffn in routed)
        return self.weight_bytes_per_token() + more

    def density(self) -> float:
        """Share of FFN neurons that were computed so far; dense layers are computed whole, and hot neurons
        where the hot device does not predict. With experts, the share of them that a token takes."""
        if self.model.hyper.routing is not None:
            return self.model.hyper.routing.share
        every = self._tokens * self.model.hyper.layers * self.model.hyper.neurons
        skipped = self._program.total_neurons() - self._program.active_neurons()
        skipped += self._hot.left_out if self._hot else 0
        return 1.0 - skipped / every if every else 1.0

    def recall(self) -> float | None:
        """Share of the active neurons that were predicted so far; None where it is not checked or nothing was
        predicted."""
        return recall_of(self._checks)

    def recall_by_layer(self) -> list[float | None] | None:
        """The same of every layer, None for those that are not predicted; None where it is not checked."""
        if not self._check_recall:
            return None
        found = dict(zip(self._checked, self._checks, strict=True))
        layers = range(self.model.hyper.layers)
        return [recall_of([found[layer]]) if layer in found else None for layer in layers]

    def predicted_density(self) -> float | None:
        """Share of their neurons that predictors named so far; None where it is not checked or nothing was
        predicted."""
        every = sum(check.neurons for check in self._checks)
        return sum(check.named for check in self._checks) / every if every else None

    def seconds(self) -> dict[str, float]:
        """Time by part so far, in seconds."""
        times = self._writer.labels.seconds([int(n) for n in self._program.nanoseconds()])
        side = self._hot or self._hot_experts
        if side:
            times["hot"] = side.seconds
            times["waiting"] = side.waiting_seconds
        return times

    def close(self) -> None:
        """Release the hot device."""
        side = self._hot or self._hot_experts
        if side:
            side.close()

    @property
    def _head_bytes(self) -> int:
        return 0 if self.head_matrix is None else self.head_matrix.nbytes

    def _attention_there(self, index: int) -> bool:
        return self._hot is not None and self._hot.has_attention(index)

    def _hot_neurons(self, index: int) -> int:
        return self._hot.hot_neurons(index) if self._hot else 0

    def _write(self) -> None:
        self._writer.embed(self.model.embedding, self.model.positions)
        for index, layer in enumerate(self.model.layers):
            self._writer.layer = index
            if isinstance(layer.ffn, ExpertsFFN):
                self._write_routed(index, layer, layer.ffn)
            elif self._beside and self._attention_there(index) and self._hot_neurons(index):
                self._write_there(index, self._beside)
            else:
                self._write_layer(index, layer)
        if not self.has_hot_head:
            self._bring_back()

    def _write_routed(self, index: int, layer: LayerWeights, experts: ExpertsFFN) -> None:
        routing, writer = self.model.hyper.routing, self._writer
        assert routing is not None
        assert self._routed is not None
        observed = self._observed[index] if self._observed else None
        hot = self._hot_experts.hot_experts(index) if self._hot_experts else frozenset[int]()
        ffn = RoutedFFN(experts, routing, self._pool, observed, hot)
        self._cold.append(ffn)
        self._write_attention(index, layer)
        rounds = any(not matrix.row_type.is_float for matrix in (experts.gate, experts.up))
        writer.ffn_input(layer.ffn_norm, quantized=ffn.quantized or (bool(hot) and rounds))
        ready = ffn.write(writer, self._buffers, self._routed)
        needed = writer.builder.mark()
        self._stops.append(_Stop(ready, needed, partial(self._run_routed, index, ffn)))
        writer.merge(FFNOutput(None, layer.ffn_post_norm), hot=False, cold=True)

    def _run_routed(self, index: int, ffn: RoutedFFN, count: int, position: int) -> None:
        ffn.compute(index, count, self._run_experts, self._hot_experts, self.timeline)

    def _run_experts(self, first: int, last: int, count: int) -> None:
        self._program.run(self._pool, first, last, count, 0)

    def _write_layer(self, index: int, layer: LayerWeights) -> None:
        """In a parallel layer the FFN's input is ready before attention, which the hot device then works
        beside, too."""
        hot_neurons = self._hot_neurons(index)
        ffn = self._cold_ffn(index, hot_neurons)
        writer, parallel = self._writer, self.model.spec.parallel
        if parallel or not self._attention_there(index):
            self._bring_back()
        if not parallel:
            self._write_attention(index, layer)
        writer.ffn_input(layer.ffn_norm, quantized=ffn.quantized or hot_neurons > 0)
        ready = writer.builder.mark()
        ffn.prepare(writer)
        if parallel:
            self._write_attention(index, layer)
        output = FFNOutput(layer.ffn_down_bias, layer.ffn_post_norm)
        self._write_cold(index, ffn, output)
        if not ffn.in_rows:
            return
        needed = writer.builder.mark()
        writer.merge(output, hot=hot_neurons > 0, cold=ffn.neurons > 0)
        if self._beside and hot_neurons:
            split = partial(self._beside.split, index, (ready, needed), ffn.neurons)
            self._stops.append(_Stop(ready, needed, split))

    def _write_there(self, index: int, beside: HotSteps) -> None:
        """A layer that leaves the residual stream on the hot device: only its cold neurons are computed
        here."""
        ffn = self._cold_ffn(index, self._hot_neurons(index))
        writer, arrives = self._writer, not self._away
        ready = writer.builder.mark()
        if ffn.neurons:
            writer.cold_input(quantized=ffn.quantized)
            ffn.prepare(writer)
            self._write_cold(index, ffn, FFNOutput(None, None))
        needed = writer.builder.mark()
        there = partial(beside.there, index, (ready, needed), ffn.neurons, arrives)
        self._stops.append(_Stop(ready, needed, there))
        self._away = True

    def _cold_ffn(self, index: int, hot_neurons: int) -> ColdFFN:
        """The FFN of layer ``index`` without its hot neurons."""
        tokens = self._buffers.x.shape[0]
        mode, named = self._modes[index], self._hot is not None and self._hot.has_predictor(index)
        ffn = load_cold_ffn(self.model, index, self._pool, mode, hot_neurons, tokens, named=named)
        if self._thresholds is not None:
            ffn = with_thresholds(ffn, self._thresholds[index])
        self._cold.append(ffn)
        return ffn

    def _write_cold(self, index: int, ffn: ColdFFN, output: FFNOutput) -> None:
        """The operations of ``ffn``, and what looks on."""
        ffn.write(self._writer, self._buffers, output, self._observed[index] if self._observed else None)
        if self._check_recall:
            check = write_recall_check(self.model, index, self._pool, ffn, self._writer, self._buffers)
            if check is not None:
                self._checks.append(check)
                self._checked.append(index)
        self._ffn_ends.append(self._writer.builder.mark())

    def _write_attention(self, index: int, layer: LayerWeights) -> None:
        cache = self._caches[index]
        if cache is None:
            assert self._beside is not None
            here, arrives = self._writer.builder.mark(), not self._away
            self._stops.append(_Stop(here, here, partial(self._beside.attention, index, arrives)))
            self._away = False
            return
        window = self.model.hyper.window if self.model.hyper.local_layers[index] else 0
        self._writer.attention(layer.attention, cache, self._tables[index], window)

    def _bring_back(self) -> None:
        """From here on, the residual stream is needed outside the hot device."""
        if self._beside and self._away:
            here = self._writer.builder.mark()
            self._stops.append(_Stop(here, here, self._beside.leave))
            self._away = False

    def _place(self, tokens: Sequence[int], position: int) -> None:
        """Say which tokens come, and where they stand."""
        count, positions = len(tokens), self._buffers.positions
        self._buffers.tokens[:count] = tokens
        if positions is not None:
            first = position + (self.model.spec.position_offset or 0)
            positions[:count] = np.arange(first, first + count)

    def _run_parts(self, first: int, last: int, count: int, position: int) -> None:
        """:meth:`run`; where a timeline is kept, part by part."""
        if self.timeline is None:
            self.run(first, last, count, position)
            return
        for begin, end, name, layer in self._writer.labels.parts(first, last):
            started = time.perf_counter()
            self.run(begin, end, count, position)
            self.timeline.add("CPU", name, layer, started, time.perf_counter())

    def run(self, first: int, last: int, count: int, position: int) -> None:
        """Run the operations from ``first`` to ``last`` over ``count`` tokens at ``position``, and look on
        where that was asked for."""
        for check in self._checks:
            if first < check.after <= last:
                self._program.run(self._pool, first, check.after, count, position)
                check.count(count)
                first = check.after
        if first < last:
            self._program.run(self._pool, first, last, count, position)


def _open_hot(
    model: Model, options: StackOptions, work: Workload
) -> tuple[HotSide | None, HotExpertSide | None, Sequence[str]]:
    """The hot side of the model's kind, if there is to be one, and what must be said. Raises ModelError where
    what is not in a GPU's memory does not fit in the machine's."""
    side, experts = None, None
    if model.hyper.routing is None:
        side, notices = open_hot_side(model, options.device, options.vram, work)
    else:
        experts, notices = open_hot_experts(model, options.device, options.vram, options.batch)
    if options.device == "cuda":
        opened = side or experts
        try:
            held = side.stored_bytes if side else experts.weight_bytes if experts else 0
            require_memory(model, options.context, options.kv_type, available_ram_bytes(), held)
        except ModelError:
            if opened:
                opened.close()
            raise
    return side, experts, notices
