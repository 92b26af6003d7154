"""All layers of a model: runs their program, and stops where a hot device or a router takes part."""

import time
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from powerinfer_kernels import KernelError, Matrix, Pool, State
from powerinfer_tools.detect import available_ram_bytes
from powerinfer_tools.engine.caches import Places, allocate_state, require_kv_type
from powerinfer_tools.engine.cold_ffn import predictor_thresholds
from powerinfer_tools.engine.cold_side import Computed
from powerinfer_tools.engine.hot import HotSide, open_hot_side
from powerinfer_tools.engine.hot.placement import Workload
from powerinfer_tools.engine.layer_shares import LayerShare, layer_shares
from powerinfer_tools.engine.memory import require_memory
from powerinfer_tools.engine.modes import layer_modes, whole_experts
from powerinfer_tools.engine.recall import Counted, HotFound, recall_of
from powerinfer_tools.engine.residency import Residency
from powerinfer_tools.engine.stack_options import StackOptions
from powerinfer_tools.engine.stack_writer import StackWriter
from powerinfer_tools.engine.timeline import Timeline
from powerinfer_tools.errors import ModelError
from powerinfer_tools.model.loading import Model

Floats = npt.NDArray[np.float32]
#: Number of tokens after which pages of a mapped embedding table are released, where memory is short.
DROP_TOKENS = 512
#: An observer of FFNs; its arguments are the layer, the normalised FFN input, and act(gate)·up.
Watch = Callable[[int, Floats, Floats], None]


class LayerStack:
    """Embedding and layers: tokens in, residual stream ``x`` out."""

    def __init__(self, model: Model, pool: Pool, options: StackOptions) -> None:
        self.model, self._pool = model, pool
        #: The experts that are read from disk; None where all are in memory.
        self.residency = options.residency
        require_kv_type(model, options.kv_type)
        self._modes = layer_modes(model, options.mode)
        if isinstance(self.residency, Residency) and options.mode is None:
            self._modes = whole_experts(model, self._modes)  # as experts from disk are computed
        predicted = frozenset(i for i, mode in enumerate(self._modes) if mode == "predicted")
        work = Workload(options.batch, options.context, options.kv_type, predicted, options.check_recall)
        self._hot, self._notices = _open_hot(model, options, work)
        #: The timeline that each forward pass is recorded in, if any.
        self.timeline: Timeline | None = None
        self.device = options.device if self._hot else "none"
        try:
            self._lay_out(options)
        except BaseException:
            self.close()
            raise

    def _lay_out(self, options: StackOptions) -> None:
        """Pack the weights and write the program."""
        model, pool = self.model, self._pool
        made = StackWriter(model, pool, options, self._modes, self._hot, self)
        self._written, self._buffers, self._stops = made, made.buffers, made.stops
        self._checks, self._check_recall = made.checks, options.check_recall
        self._pauses = made.pauses
        self._tokens = 0
        self._length = made.writer.mark()
        #: The head's rows; None where the hot device has them.
        self.head_matrix: Matrix | None = None if self.has_hot_head else options.packed.of(pool, model.head)
        if self.residency is not None:
            assert options.budget is not None
            self.residency.open(options.budget)
        self._program = made.builder.build()

    @property
    def x(self) -> Floats:
        """The residual stream, float32 (batch, width); row t is the t-th token of the last forward."""
        return self._buffers.x

    @property
    def tokens(self) -> int:
        """Number of tokens in all forward passes so far."""
        return self._tokens

    @property
    def modes(self) -> tuple[str, ...]:
        """The mode of each layer."""
        return self._modes

    @property
    def mode(self) -> str:
        """The mode of every layer, or "mixed"."""
        return self._modes[0] if len(set(self._modes)) == 1 else "mixed"

    @property
    def weight_bytes(self) -> int:
        """Size of all weights as laid out for the kernels, in bytes."""
        return (
            self._written.ops.weight_bytes
            + sum(ffn.nbytes for ffn in self._written.cold.values())
            + self._head_bytes
            + (self.residency.nbytes if self.residency else 0)
        )

    @property
    def has_hot_side(self) -> bool:
        """Whether a hot device computes a part of the model."""
        return self._hot is not None

    @property
    def serves_one(self) -> bool:
        """Whether there is room for only one session: either the hot device computes attention and has one
        cache, or experts are read from disk and use the memory that other sessions would need."""
        if self.residency is not None:
            return True
        return self._hot is not None and any(map(self._hot.has_attention, range(self.model.hyper.layers)))

    @property
    def hot(self) -> HotSide | None:
        """The hot device's part of the model; None without a hot device."""
        return self._hot

    @property
    def has_hot_head(self) -> bool:
        """Whether the hot device computes the logits."""
        return self._hot is not None and self._hot.has_head

    @property
    def notices(self) -> Sequence[str]:
        """Where the hot side had to deviate from the request, in words for the user."""
        return self._hot.notices if self._hot else self._notices

    @property
    def vram_peak_bytes(self) -> int | None:
        """The most bytes that the hot device held; None where they are not counted."""
        return self._hot.peak_bytes if self._hot else None

    @property
    def vram_bytes(self) -> int:
        """The memory that the hot device holds, in bytes."""
        return self._hot.nbytes if self._hot else 0

    @property
    def scratch_bytes(self) -> int:
        """Size of activations and tables in bytes."""
        routed = 0 if self._written.routed is None else self._written.routed.nbytes
        tables = sum(table.nbytes for table in self._written.tables.values())
        tables += sum(table.nbytes for table in self._written.growths.values())
        return self._buffers.nbytes + tables + routed

    def new_state(self, context: int, kv_type: str) -> State:
        """The state that a session of ``context`` positions keeps outside the hot device. Raises
        ModelError."""
        return allocate_state(self.model, self._program.slots, context, kv_type)

    def forward(self, tokens: Sequence[int], places: Places) -> int:
        """Run all layers over ``tokens`` at ``places``; returns their number. Raises ModelError."""
        count = len(tokens)
        self.check_tokens(tokens)
        self._place(tokens, places)
        if self._hot:
            self._hot.time(on=self.timeline is not None)
        first = 0
        for stop in self._stops:
            self._run_parts(first, stop.ready, count, places)
            stop.work(count, places)
            first = stop.needed
        self._run_parts(first, self._length, count, places)
        if self.residency and (self._tokens + count) // DROP_TOKENS > self._tokens // DROP_TOKENS:
            self.residency.drop_pages()
        self._tokens += count
        if self._written.beside:
            self._written.beside.keep_spans()
        return count

    def check_tokens(self, tokens: Sequence[int]) -> None:
        """Raise ModelError for ids outside the vocabulary."""
        vocabulary = self.model.hyper.vocabulary
        for token in tokens:
            if not 0 <= token < vocabulary:
                raise ModelError(f"token id {token} is outside the vocabulary of {vocabulary}")

    def hot_logits(self, first: int, last: int) -> Floats:
        """Logits (rows, vocabulary) of the tokens ``first`` to ``last`` of the last forward, by the hot
        device; valid until the next call."""
        assert self._written.beside is not None
        return self._written.beside.logits(first, last, stayed=self._written.away)

    def forward_watched(self, tokens: Sequence[int], places: Places, watch: Watch) -> int:
        """:meth:`forward` of a source model, calling ``watch`` after every FFN with its layer, its normalised
        input (tokens, width) and act(gate)·up (tokens, neurons): views, valid during the call."""
        assert self.model.is_source
        count, first = len(tokens), 0
        self._place(tokens, places)
        for layer, end in enumerate(self._written.ffn_ends):
            self.run(first, end, count, places)
            watch(layer, self._buffers.normed[:count], self._buffers.gate[:count])
            first = end
        self.run(first, self._length, count, places)
        return count

    def known_factors(self, tokens: int) -> tuple[Floats, Floats]:
        """act(gate) and up of the FFN that ran last, (tokens, neurons) each: views, for an observer of a
        source model that runs with thresholds."""
        assert self._buffers.scores is not None
        return self._buffers.scores[:tokens], self._buffers.up[:tokens]

    def set_thresholds(self, layer: int, values: Floats | None) -> None:
        """Replace the thresholds (neurons) of the predictor of ``layer``, if it has one, from the next run
        on. With None, every neuron is named, which is exact."""
        held = predictor_thresholds(self._written.cold[layer])
        if held is not None:
            held[:] = -np.inf if values is None else values

    def weight_bytes_per_token(self) -> float:
        """Mean bytes of weights that one decoded token touches, with the density seen so far."""
        computed = self._computed()
        return self._besides_ffns + sum(ffn.bytes_per_token(computed) for ffn in self._written.cold.values())

    def weight_bytes_per_pass(self) -> float:
        """Mean bytes of weights that a forward pass touched so far, whatever its number of tokens: an expert
        counts once if any token of a batch takes it."""
        computed = self._computed()
        return self._besides_ffns + sum(ffn.bytes_per_pass(computed) for ffn in self._written.cold.values())

    def _computed(self) -> Computed:
        program, total = self._program, self._program.total_neurons()
        if not total:
            return Computed(1, 1)
        return Computed(program.active_neurons() / total, program.confirmed_neurons() / total)

    @property
    def _besides_ffns(self) -> int:
        """Bytes that a token touches outside the cold FFNs. The experts that it takes, on both sides, count
        as cold."""
        tables = (self.model.embedding, self.model.positions)
        embedded = sum(table.nbytes // table.rows for table in tables if table is not None)
        hot = self._hot.weight_bytes if self._hot else 0
        return self._written.ops.weight_bytes + self._head_bytes + embedded + hot

    def density(self) -> float:
        """Share of FFN neurons that were computed so far. All neurons of dense layers are computed, and all
        hot neurons where the hot device does not predict. With experts, it is the share of the experts that a
        token takes, times the share of their neurons that are computed where zero neurons are left out."""
        if self.model.hyper.routing is not None:
            return self.model.hyper.routing.share * self._computed().confirmed
        neurons = sum(facts.neurons for facts in self.model.hyper.facts if facts.ffn == "dense")
        every = self._tokens * neurons
        skipped = self._program.total_neurons() - self._program.active_neurons()
        skipped += self._hot.left_out if self._hot else 0
        return 1.0 - skipped / every if every else 1.0

    def layer_shares(self) -> list[LayerShare]:
        """The share of each layer's neurons that was computed so far, and where."""
        parts, counted = self._written.writer.labels.parts(0, self._length), self._program.neurons()
        return layer_shares(self.model, self._modes, self._hot, parts, counted, self._tokens)

    def recall(self) -> float | None:
        """Share of the active neurons, hot and cold, that were predicted so far; None if recall is not
        checked or nothing was predicted."""
        return recall_of([counts for layer in self._counted().values() for counts in layer])

    def recall_by_layer(self) -> list[float | None] | None:
        """The recall of each layer, None for a layer without predictions; None if recall is not checked."""
        if not self._check_recall:
            return None
        return [recall_of(counts) for counts in self._counted().values()]

    def predicted_density(self) -> float | None:
        """Share of their neurons that predictors named so far; None if recall is not checked or nothing was
        predicted."""
        counted = [counts for layer in self._counted().values() for counts in layer]
        every = sum(counts.neurons for counts in counted)
        return sum(counts.named for counts in counted) / every if every else None

    def _counted(self) -> dict[int, list[Counted]]:
        """The counters of predictors, layer by layer: for neurons that the host computes, and for hot neurons
        where the hot device predicts."""
        counted = {layer: list[Counted]() for layer in range(self.model.hyper.layers)}
        for layer, check in zip(self._written.checked, self._checks, strict=True):
            counted[layer].append(check)
        if self._hot is None or not self._check_recall:
            return counted
        for layer, counts in counted.items():
            predicted, every = self._hot.predicted(layer), self._tokens * self._hot.hot_neurons(layer)
            if predicted is not None:
                counts.append(HotFound(predicted[1], predicted[2], every - predicted[0], every))
        return counted

    def seconds(self) -> dict[str, float]:
        """Time by part so far, in seconds."""
        times = self._written.writer.labels.seconds([int(n) for n in self._program.nanoseconds()])
        if self._hot and self._hot.seconds:  # a GPU reports seconds while a timeline is kept
            times["hot"] = self._hot.seconds
            times["waiting"] = self._hot.waiting_seconds
        return times

    def close(self) -> None:
        """Release the hot device, and the experts on disk."""
        if self._hot:
            self._hot.close()
        if self.residency:
            self.residency.close()

    @property
    def _head_bytes(self) -> int:
        return 0 if self.head_matrix is None else self.head_matrix.nbytes

    def _place(self, tokens: Sequence[int], places: Places) -> None:
        """Set the tokens of the next pass, and their positions."""
        positions, row = self._buffers.positions, 0
        self._buffers.tokens[: len(tokens)] = tokens
        if positions is None:
            return
        for span in places.spans:
            first = span.position + (self.model.spec.position_offset or 0)
            if span.tokens == 1:
                positions[row] = first
            else:
                positions[row : row + span.tokens] = np.arange(first, first + span.tokens)
            row += span.tokens

    def _run_parts(self, first: int, last: int, count: int, places: Places) -> None:
        """:meth:`run`; where a timeline is kept, part by part."""
        if self.timeline is None:
            self.run(first, last, count, places)
            return
        for begin, end, name, layer in self._written.writer.labels.parts(first, last):
            started = time.perf_counter()
            self.run(begin, end, count, places)
            self.timeline.add("CPU", name, layer, started, time.perf_counter())

    def run(self, first: int, last: int, count: int, places: Places | None = None) -> None:
        """Run the operations from ``first`` to ``last`` over ``count`` tokens at ``places`` (None: the
        operations do not depend on the positions of tokens), with the pauses between them."""
        for pause in self._pauses:
            if first < pause.after <= last:
                self._run(first, pause.after, count, places)
                pause.count(count)
                first = pause.after
        if first < last:
            self._run(first, last, count, places)

    def _run(self, first: int, last: int, count: int, places: Places | None) -> None:
        try:
            if places is None:
                self._program.run(self._pool, first, last, count)
            else:
                self._program.run_spans(self._pool, first, last, places.spans)
        except KernelError:
            problem = self.residency.problem() if self.residency else None
            if problem is None:
                raise
            raise ModelError(problem) from None


def _open_hot(model: Model, options: StackOptions, work: Workload) -> tuple[HotSide | None, Sequence[str]]:
    """The hot side, if one was requested, and notices for the user. Raises ModelError if the part outside the
    GPU's memory does not fit in the machine's memory."""
    side, notices = open_hot_side(model, options.device, options.vram, work, options.progress)
    if options.device == "cuda":
        try:
            held = side.stored_bytes if side else 0
            require_memory(model, options.context, options.kv_type, available_ram_bytes(), held)
        except ModelError:
            if side:
                side.close()
            raise
    return side, notices
