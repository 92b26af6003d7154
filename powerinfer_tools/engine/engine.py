"""The engine's face: prompt processing, decoding and scoring of one model."""

import time
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from powerinfer_kernels import Pool, read_bandwidth
from powerinfer_tools.detect import available_ram_bytes
from powerinfer_tools.engine.factor_thresholds import FactorThresholds
from powerinfer_tools.engine.head import HEAD_ROWS, Head
from powerinfer_tools.engine.layers import LayerStack, Watch
from powerinfer_tools.engine.memory import require_memory
from powerinfer_tools.engine.observation import LayerCounters
from powerinfer_tools.engine.report import EngineReport, Memory
from powerinfer_tools.engine.stack_options import StackOptions
from powerinfer_tools.engine.timeline import Timeline
from powerinfer_tools.errors import ContextFull, ModelError
from powerinfer_tools.model.loading import Model
from powerinfer_tools.progress import Progress, Silent

Floats = npt.NDArray[np.float32]
#: Context when none is asked for: what a chat needs, without reserving a long-context model's whole cache.
DEFAULT_CONTEXT = 4096
DEFAULT_BATCH = 512


class Engine:
    """Runs one model. Not thread-safe; results do not depend on ``threads``, ``batch`` or ``isa``.

    ``mode`` None takes what the file says (a source model is dense). ``device`` "none" computes everything in
    the C kernels; "cpu" and "cuda" give the hot part of a split file to torch on that device. ``vram`` limits
    the hot part to that many bytes by moving the split point. ``kv_type`` "q8_0" halves the KV cache, at a
    small cost in precision. ``observed`` counters, one of each layer, are
    added to by every forward pass of a source model. ``check_recall`` computes beside every prediction what
    it should have found, for the report; results stay the same bits. ``thresholds`` of each layer of a source
    model leave neurons out, as they say at the time of each pass.
    """

    def __init__(
        self,
        model: Model,
        *,
        threads: int | None = None,
        context: int | None = None,
        batch: int = DEFAULT_BATCH,
        isa: str | None = None,
        mode: str | None = None,
        device: str = "none",
        vram: int | None = None,
        kv_type: str = "f16",
        observed: Sequence[LayerCounters] | None = None,
        check_recall: bool = False,
        thresholds: Sequence[FactorThresholds] | None = None,
    ) -> None:
        started = time.perf_counter()
        self.model = model
        self.context = _check_context(model, context)
        if device != "cuda":  # the layers judge it when they know what the GPU holds
            require_memory(model, self.context, kv_type, available_ram_bytes())
        self._pool = Pool(threads, isa)
        batch = max(1, min(batch, self.context))
        options = StackOptions(
            batch, self.context, mode, device, vram, kv_type, observed, check_recall, thresholds
        )
        self._stack = LayerStack(model, self._pool, options)
        matrix = self._stack.head_matrix
        self._head = None if matrix is None else Head(model, self._pool, matrix)
        self._batch, self._position = batch, 0
        self._prompt_tokens = self._decode_tokens = self._decoded_cache_bytes = 0
        self._prompt_seconds = self._decode_seconds = 0.0
        self._load_seconds = time.perf_counter() - started

    @property
    def position(self) -> int:
        """Tokens in the KV cache."""
        return self._position

    @property
    def vocabulary(self) -> int:
        """Number of logits."""
        return self.model.hyper.vocabulary

    @property
    def threads(self) -> int:
        """Threads that compute."""
        return self._pool.threads

    @property
    def batch(self) -> int:
        """Largest number of prompt tokens processed at a time."""
        return self._batch

    def read_bandwidth(self) -> float:
        """Measure the machine's read bandwidth with the engine's own threads, in bytes per second."""
        return read_bandwidth(self._pool)

    @property
    def notices(self) -> Sequence[str]:
        """What could not be done as asked, and what is done instead: each once, in words for the user."""
        return self._stack.notices

    def trace(self) -> Timeline:
        """Keep a timeline of every token that is decoded from now on, and forget that of the one before."""
        timeline = self._stack.timeline
        if timeline is None:
            timeline = self._stack.timeline = Timeline()
        return timeline

    @property
    def stack(self) -> LayerStack:
        """The layers, for stages that look inside (profile)."""
        return self._stack

    def prefill(self, tokens: Sequence[int], progress: Progress | None = None) -> Floats:
        """Process ``tokens`` after what is in the cache; logits (vocabulary,) after the last of them.

        Raises ContextFull (with the cache unchanged) when they do not fit.
        """
        if len(tokens) == 0:
            raise ValueError("prefill needs at least one token")
        self._require_room(len(tokens))
        progress = progress or Silent()
        started = time.perf_counter()
        count = 0
        for first in range(0, len(tokens), self._batch):
            count = self._forward(tokens[first : first + self._batch])
            progress.advance(count)
        logits: Floats = self._logits(count - 1, count)[0]
        self._prompt_tokens += len(tokens)
        self._prompt_seconds += time.perf_counter() - started
        return logits

    def decode(self, token: int) -> Floats:
        """Logits (vocabulary,) after one more token; valid until the next call. Raises ContextFull."""
        self._require_room(1)
        started, timeline = time.perf_counter(), self._stack.timeline
        if timeline is not None:
            timeline.restart()
        self._forward([token])
        forwarded = time.perf_counter()
        logits: Floats = self._logits(0, 1)[0]
        if timeline is not None:
            name = "head" if self._head else "wait"
            timeline.add("CPU", name, None, forwarded, time.perf_counter())
        self._decode_tokens += 1
        self._decoded_cache_bytes += self._stack.cache_bytes_read(self._position)
        self._decode_seconds += time.perf_counter() - started
        return logits

    def score(self, tokens: Sequence[int], first: int = 0) -> Iterator[Floats]:
        """Logits (k, vocabulary) of successive positions from ``first`` on, for a fresh window of ``tokens``.

        Forgets the cache. Each array is valid until the next one is asked for.
        """
        self.rewind(0)
        self._require_room(len(tokens))
        for start in range(0, len(tokens), self._batch):
            count = self._forward(tokens[start : start + self._batch])
            for row in range(max(0, first - start), count, HEAD_ROWS):
                yield self._logits(row, min(row + HEAD_ROWS, count))

    def absorb(self, tokens: Sequence[int], watch: Watch | None = None) -> None:
        """Run a fresh window of ``tokens`` through the layers alone, for the sake of the counters.

        ``watch`` is called after the FFN of every layer, see :meth:`LayerStack.forward_watched`; it needs a
        source model and a window of one batch.
        """
        self.rewind(0)
        self._require_room(len(tokens))
        if watch is not None:
            assert len(tokens) <= self._batch
            self._position += self._stack.forward_watched(tokens, 0, watch)
            return
        for first in range(0, len(tokens), self._batch):
            self._forward(tokens[first : first + self._batch])

    def rewind(self, position: int) -> None:
        """Forget everything in the cache from ``position`` on."""
        if not 0 <= position <= self._position:
            raise ValueError(f"cannot rewind to {position}: the cache holds {self._position} tokens")
        self._position = position

    def report(self) -> EngineReport:
        """Counters since the engine was made."""
        stack = self._stack
        cache_bytes = self._decoded_cache_bytes / self._decode_tokens if self._decode_tokens else 0.0
        timings = stack.seconds() | ({"head": self._head.seconds} if self._head else {})
        routing = self.model.hyper.routing
        return EngineReport(
            mode=stack.mode,
            device=stack.device,
            threads=self._pool.threads,
            isa=self._pool.isa,
            prompt_tokens=self._prompt_tokens,
            prompt_seconds=self._prompt_seconds,
            decode_tokens=self._decode_tokens,
            decode_seconds=self._decode_seconds,
            bytes_per_token=stack.weight_bytes_per_token() + cache_bytes,
            density=stack.density(),
            experts=(routing.used, routing.experts) if routing else None,
            recall=stack.recall(),
            timings=timings,
            kv_type=stack.kv_type,
            load_seconds=self._load_seconds,
            memory=Memory(
                weights=stack.weight_bytes,
                kv_cache=stack.cache_nbytes,
                scratch=stack.scratch_bytes + (self._head.nbytes if self._head else 0),
                vram=stack.vram_bytes,
                vram_peak=stack.vram_peak_bytes,
            ),
        )

    def close(self) -> None:
        """Stop the threads. The engine cannot be used afterwards."""
        self._stack.close()
        self._pool.close()

    def _logits(self, first: int, last: int) -> Floats:
        """Logits (rows, vocabulary) of tokens of the last forward."""
        if self._head is None:
            return self._stack.hot_logits(first, last)
        return self._head.logits(self._stack.x[first:last])

    def _forward(self, tokens: Sequence[int]) -> int:
        count = self._stack.forward(tokens, self._position)
        self._position += count
        return count

    def _require_room(self, tokens: int) -> None:
        if self._position + tokens > self.context:
            raise ContextFull(
                f"{tokens} more tokens do not fit: the context holds {self.context} and {self._position} "
                "are used; ask for a longer context (-c) or start anew"
            )


def _check_context(model: Model, context: int | None) -> int:
    trained = model.hyper.trained_context
    if context is None:
        return min(trained, DEFAULT_CONTEXT)
    if not 1 <= context <= trained:
        raise ModelError(
            f"{model.path}: context {context} is not from 1 to {trained}, what the model was trained for"
        )
    return context
