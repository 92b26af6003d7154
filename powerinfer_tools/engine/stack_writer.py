"""Writes all layers of a model as one program, with the points where a hot device or a router joins in."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from powerinfer_kernels import Pool, ProgramBuilder
from powerinfer_tools.engine.blocks import BlockWriter, FFNOutput
from powerinfer_tools.engine.buffers import allocate
from powerinfer_tools.engine.caches import Places, kv_slots
from powerinfer_tools.engine.cold_ffn import (
    ColdFFN,
    Computed,
    load_cold_ffn,
    with_thresholds,
    write_recall_check,
)
from powerinfer_tools.engine.hot import HotSide
from powerinfer_tools.engine.hot_steps import Host, HotSteps
from powerinfer_tools.engine.observation import LayerCounters
from powerinfer_tools.engine.program_operations import Inputs, ProgramOperations
from powerinfer_tools.engine.recall import RecallCheck
from powerinfer_tools.engine.routed import RoutedFFN, routed_buffers
from powerinfer_tools.engine.routed_steps import RoutedSteps
from powerinfer_tools.engine.stack_options import StackOptions
from powerinfer_tools.model.ffn_matrices import ExpertsFFN
from powerinfer_tools.model.layer_weights import LayerWeights
from powerinfer_tools.model.loading import Model
from powerinfer_tools.model.rotary import growth_tables, rope_tables


@dataclass(frozen=True)
class Stop:
    """Operations [ready, needed) of one layer that are not simply run one after the other: ``work`` runs
    them, called with the number of tokens and their places."""

    ready: int
    needed: int
    work: Callable[[int, Places], None]


class Laid(Protocol):
    """One layer's FFN, or its experts, as laid out for the kernels."""

    @property
    def nbytes(self) -> int:
        """Size of the weights, in bytes."""

    def bytes_per_token(self, computed: Computed) -> float:
        """Bytes that one decoded token touches."""


class StackWriter:
    """What the program of a model consists of; ``host`` runs it."""

    def __init__(
        self,
        model: Model,
        pool: Pool,
        options: StackOptions,
        modes: Sequence[str],
        hot: HotSide | None,
        host: Host,
    ) -> None:
        self._model, self._pool, self._options, self._modes, self._hot = model, pool, options, modes, hot
        self.buffers = allocate(
            model,
            options.batch,
            hot=hot is not None,
            scores="predicted" in modes or options.thresholds is not None,
        )
        self.builder = ProgramBuilder(options.batch)
        here = [
            layer.attends is not None
            and model.hyper.facts[index].cache is None
            and not self._attention_there(index)
            for index, layer in enumerate(model.layers)
        ]
        self._slots = kv_slots(self.builder, model, options.context, here)
        self.tables = rope_tables(model.hyper, options.context, model.rope_factors)
        self.growths = growth_tables(model.hyper, options.context)
        self.ops = ProgramOperations(
            self.builder,
            self.buffers.scratch,
            pool,
            self.tables,
            self._slots,
            Inputs(self.buffers.tokens, self.buffers.positions),
            self.growths,
            options.packed,
        )
        self.writer = BlockWriter(model, self.ops, self.buffers)
        self.stops: list[Stop] = []
        #: Whether, at the operation being written, the residual stream is on the device.
        self.away = False
        self.routed = routed_buffers(model.hyper, self.buffers, gated=model.spec.gated)
        self.ffn_ends: list[int] = []
        #: The FFN of each layer: a ColdFFN, or a RoutedFFN.
        self.laid: list[Laid] = []
        self.cold: dict[int, ColdFFN] = {}
        self.checks: list[RecallCheck] = []
        self.checked: list[int] = []
        self.beside = HotSteps(hot, self.buffers, host) if hot else None
        self._routing = RoutedSteps(hot, self.buffers, self.routed, host) if self.routed else None
        self._write()

    def _write(self) -> None:
        self.writer.embed(self._model)
        for index, layer in enumerate(self._model.layers):
            self.writer.layer = index
            if layer.feeds is None:
                self._write_attention(index, layer)
            elif isinstance(layer.feeds, ExpertsFFN):
                self._write_routed(index, layer, layer.feeds)
            elif self.beside and self._attention_there(index) and self._hot_neurons(index):
                self._write_there(index, self.beside)
            else:
                self._write_layer(index, layer)
            self.writer.finish(layer)
            if self._options.residency is not None:
                self._options.residency.drop_pages()
        if not (self._hot and self._hot.has_head):
            self._bring_back()
        self.writer.merge_streams(self._model)

    def _attention_there(self, index: int) -> bool:
        return self._hot is not None and self._hot.has_attention(index)

    def _hot_neurons(self, index: int) -> int:
        return self._hot.hot_neurons(index) if self._hot else 0

    def _write_routed(self, index: int, layer: LayerWeights, experts: ExpertsFFN) -> None:
        """A layer with experts: where its attention is on the hot device, it leaves the residual stream
        there, and only cold experts are computed here."""
        routing, writer, there = self._model.hyper.routing, self.writer, self._attention_there(index)
        assert routing is not None
        assert self.routed is not None
        assert self._routing is not None
        hot = self._hot.hot_experts(index) if self._hot else frozenset[int]()
        source, residency = self.buffers.normed, self._options.residency
        disk = None if residency is None else (residency, index)
        observed = self._observed(index)
        ffn = RoutedFFN(experts, routing, self._pool, observed, hot, scored_there=there, disk=disk)
        self.laid.append(ffn)
        if there:
            arrives, self.away = not self.away, True
            work = partial(self._routing.there, index, ffn, arrives)
        else:
            self._bring_back()
            early = self._model.spec.early_router
            if early:
                ffn.write_router(writer, self.buffers.x, self.routed)
            if experts.beside_norm is not None:
                source = writer.expert_input(experts.beside_norm)
            parallel = self._model.hyper.parallel
            if not parallel:
                self._write_attention(index, layer)
            rounds = any(not matrix.row_type.is_float for matrix in experts.stacks[:-1])
            writer.ffn_input(layer, quantized=ffn.quantized or (bool(hot) and rounds))
            if parallel:
                self._write_attention(index, layer)
            if not early:
                ffn.write_router(writer, source, self.routed)
            work = partial(self._routing.here, index, ffn)
        ffn.write(writer, self.buffers, self.routed, source)
        writer.scale_block(self._model.spec.shared_factor if experts.shared is not None else 1.0)
        if hot or there:
            ready = ffn.choosing[0] if there else ffn.working[0]
            self.stops.append(Stop(ready, writer.mark(), work))
        if not there:
            writer.merge(FFNOutput(None, layer.ffn_post_norm), hot=False, cold=True)

    def _write_layer(self, index: int, layer: LayerWeights) -> None:
        """In a parallel layer the FFN's input is ready before attention, which the hot device then works
        beside, too."""
        hot_neurons = self._hot_neurons(index)
        ffn = self._cold_ffn(index, hot_neurons, alone=hot_neurons == 0)
        writer, parallel = self.writer, self._model.hyper.parallel
        if parallel or not self._attention_there(index):
            self._bring_back()
        if not parallel:
            self._write_attention(index, layer)
        writer.ffn_input(layer, quantized=ffn.quantized or hot_neurons > 0)
        ready = writer.mark()
        ffn.prepare(writer)
        if parallel:
            self._write_attention(index, layer)
        output = FFNOutput(layer.ffn_down_bias, layer.ffn_post_norm)
        self._write_cold(index, ffn, output)
        if not ffn.in_rows:
            return
        needed = writer.mark()
        writer.merge(output, hot=hot_neurons > 0, cold=ffn.neurons > 0)
        if self.beside and hot_neurons:
            split = partial(self.beside.split, index, (ready, needed), ffn.neurons)
            self.stops.append(Stop(ready, needed, split))

    def _write_there(self, index: int, beside: HotSteps) -> None:
        """A layer that leaves the residual stream on the hot device: only its cold neurons are computed
        here."""
        ffn = self._cold_ffn(index, self._hot_neurons(index))
        writer, arrives = self.writer, not self.away
        ready = writer.mark()
        if ffn.neurons:
            writer.cold_input(quantized=ffn.quantized)
            ffn.prepare(writer)
            self._write_cold(index, ffn, FFNOutput(None, None))
        needed = writer.mark()
        there = partial(beside.there, index, (ready, needed), ffn.neurons, arrives)
        self.stops.append(Stop(ready, needed, there))
        self.away = True

    def _cold_ffn(self, index: int, hot_neurons: int, *, alone: bool = False) -> ColdFFN:
        """The FFN of layer ``index`` without its hot neurons; ``alone``: the hot device has no part in it."""
        tokens, thresholds = self._options.batch, self._options.thresholds
        mode, named = self._modes[index], self._hot is not None and self._hot.has_predictor(index)
        shared = self._options.packed
        ffn = load_cold_ffn(
            self._model, index, self._pool, shared, mode, hot_neurons, tokens, named=named, alone=alone
        )
        if thresholds is not None:
            ffn = with_thresholds(ffn, thresholds[index])
        self.laid.append(ffn)
        self.cold[index] = ffn
        return ffn

    def _write_cold(self, index: int, ffn: ColdFFN, output: FFNOutput) -> None:
        """The operations of ``ffn``, and what looks on."""
        ffn.write(self.writer, self.buffers, output, self._observed(index))
        if self._options.check_recall:
            check = write_recall_check(
                self._model, index, self._pool, self._options.packed, ffn, self.writer, self.buffers
            )
            if check is not None:
                self.checks.append(check)
                self.checked.append(index)
        self.ffn_ends.append(self.writer.mark())

    def _observed(self, index: int) -> LayerCounters | None:
        return self._options.observed[index] if self._options.observed else None

    def _write_attention(self, index: int, layer: LayerWeights) -> None:
        if self._attention_there(index):
            assert self.beside is not None
            here, arrives = self.writer.mark(), not self.away
            self.stops.append(Stop(here, here, partial(self.beside.attention, index, arrives)))
            self.away = False
            return
        self.writer.mix(index, layer)

    def _bring_back(self) -> None:
        """From here on, the residual stream is needed outside the hot device."""
        if self.beside and self.away:
            here = self.writer.mark()
            self.stops.append(Stop(here, here, self.beside.leave))
            self.away = False
