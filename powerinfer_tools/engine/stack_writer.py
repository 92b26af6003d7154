"""Writes all layers of a model as one program, with the points where a hot device or a router takes part."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from powerinfer_kernels import Pool, ProgramBuilder
from powerinfer_tools.engine.blocks import BlockWriter, FFNOutput
from powerinfer_tools.engine.buffers import allocate
from powerinfer_tools.engine.caches import Places, kv_slots
from powerinfer_tools.engine.cold_ffn import load_cold_ffn, write_recall_check
from powerinfer_tools.engine.cold_side import ColdFFN, Part
from powerinfer_tools.engine.hot import HotSide
from powerinfer_tools.engine.hot_steps import ColdPart, Host, HotSteps
from powerinfer_tools.engine.layers_on_disk import LayersOnDisk
from powerinfer_tools.engine.neurons_on_disk import NeuronsOnDisk
from powerinfer_tools.engine.observation import ExpertCounters, LayerCounters, NeuronsInside
from powerinfer_tools.engine.program_operations import Inputs, ProgramOperations
from powerinfer_tools.engine.recall import RecallCheck
from powerinfer_tools.engine.residency import Residency
from powerinfer_tools.engine.routed import RoutedFFN, routed_buffers
from powerinfer_tools.engine.stack_options import StackOptions
from powerinfer_tools.model.ffn_matrices import ExpertsFFN
from powerinfer_tools.model.layer_weights import LayerWeights
from powerinfer_tools.model.loading import Model
from powerinfer_tools.model.rotary import growth_tables, rope_tables


@dataclass(frozen=True)
class Stop:
    """Operations [ready, needed) of one layer that are not simply run one after the other. ``work`` runs
    them; its arguments are the number of tokens and their places."""

    ready: int
    needed: int
    work: Callable[[int, Places], None]


class Pause(Protocol):
    """Work of Python on the buffers, for which a run is interrupted after the operations before ``after``."""

    @property
    def after(self) -> int:
        """The operation before which the work is done."""

    def count(self, tokens: int) -> None:
        """Do it for the first ``tokens`` rows."""


class StackWriter:
    """The parts of a model's program; ``host`` runs it."""

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
        #: By layer: the part of its FFN, or of its experts, that the host computes.
        self.cold: dict[int, ColdFFN] = {}
        self.checks: list[RecallCheck] = []
        self.checked: list[int] = []
        #: The checks and everything else that interrupts a run, in order.
        self.pauses: list[Pause] = []
        self.beside = HotSteps(hot, self.buffers, host) if hot else None
        self._write()

    def _write(self) -> None:
        self.writer.embed(self._model)
        for index, layer in enumerate(self._model.layers):
            self.writer.layer = index
            if layer.feeds is None:
                self._write_attention(index, layer)
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

    def _write_layer(self, index: int, layer: LayerWeights) -> None:
        """In a parallel layer the FFN's input is ready before attention, so the hot device also works during
        attention."""
        ffn, some_hot = self._cold_ffn(index, layer)
        writer, parallel, on_device = self.writer, self._model.hyper.parallel, self._attention_there(index)
        if on_device and (some_hot or isinstance(layer.feeds, ExpertsFFN)):
            self._write_there(index, ffn)
            return
        if parallel or not on_device:
            self._bring_back()
        ffn.before(writer)
        if not parallel:
            self._write_attention(index, layer)
        writer.ffn_input(layer, quantized=ffn.quantized or some_hot)
        first = writer.mark()
        ffn.prepare(writer)
        if parallel:
            self._write_attention(index, layer)
        ready, output = ffn.choose(writer, first), FFNOutput(layer.ffn_down_bias, layer.ffn_post_norm)
        self._write_cold(index, ffn, output)
        if not ffn.in_rows:
            return
        if self.beside and some_hot:
            part = ColdPart(index, ffn, first, ready, writer.mark())
            self.stops.append(Stop(ready, part.last, partial(self.beside.here, part)))
        writer.merge(output)

    def _write_there(self, index: int, ffn: ColdFFN) -> None:
        """Write a layer whose residual stream, and router, if any, are on the hot device: the host computes
        only the cold part."""
        assert self.beside is not None
        writer, arrives = self.writer, not self.away
        first = writer.mark()
        ready = ffn.choose(writer, first)
        if ffn.neurons:
            writer.cold_input(quantized=ffn.quantized)
            ffn.prepare(writer)
            self._write_cold(index, ffn, FFNOutput(None, None))
        part = ColdPart(index, ffn, first, ready, writer.mark())
        self.stops.append(Stop(first, part.last, partial(self.beside.there, part, arrives)))
        self.away = True

    def _cold_ffn(self, index: int, layer: LayerWeights) -> tuple[ColdFFN, bool]:
        """The host's part of the FFN, or of the experts, of layer ``index``, and whether the hot device
        computes a part, too."""
        options, hot, observed = self._options, self._hot, self._observed(index)
        disk = options.residency
        neurons = hot.hot_neurons(index) if hot else 0
        experts = hot.hot_experts(index) if hot else frozenset[int]()
        if self.routed is not None and isinstance(layer.feeds, ExpertsFFN):
            ffn: ColdFFN = RoutedFFN(
                self._model,
                index,
                self._pool,
                self.routed,
                experts,
                scored_there=self._attention_there(index),
                residency=disk if isinstance(disk, Residency) else None,
                observed=observed,
                skips=self._modes[index] == "gate-first",
            )
        else:
            part = Part(
                mode=self._modes[index],
                tokens=options.batch,
                packed=options.packed,
                hot_neurons=neurons,
                named=hot is not None and hot.has_predictor(index),
                alone=neurons == 0,
                observed=observed,
                thresholds=options.thresholds[index] if options.thresholds else None,
                on_disk=disk if isinstance(disk, LayersOnDisk | NeuronsOnDisk) else None,
            )
            ffn = load_cold_ffn(self._model, index, self._pool, part)
        self.cold[index] = ffn
        return ffn, neurons > 0 or bool(experts)

    def _write_cold(self, index: int, ffn: ColdFFN, output: FFNOutput) -> None:
        """Append the operations of ``ffn``, and its observers."""
        ffn.write(self.writer, self.buffers, output)
        if self._options.check_recall:
            check = write_recall_check(
                self._model, index, self._pool, self._options.packed, ffn, self.writer, self.buffers
            )
            if check is not None:
                self.checks.append(check)
                self.checked.append(index)
                self.pauses.append(check)
        observed = self._observed(index)
        if isinstance(observed, ExpertCounters):
            assert self.routed is not None
            here, chosen = self.writer.mark(), self.routed.choice.chosen
            self.pauses.append(NeuronsInside(here, chosen, self.routed.pairs.gate, observed))
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
        """Fetch the residual stream from the hot device: from here on, the host needs it."""
        if self.beside and self.away:
            here = self.writer.mark()
            self.stops.append(Stop(here, here, self.beside.leave))
            self.away = False
