"""The engine's face for one conversation: prompt processing, decoding and scoring of one model."""

from collections.abc import Iterator, Sequence
from typing import TypedDict, Unpack

import numpy as np
import numpy.typing as npt

from powerinfer_tools.engine.caches import Places
from powerinfer_tools.engine.closing import Closing
from powerinfer_tools.engine.damage import require_finite
from powerinfer_tools.engine.drafting import Drafter, Proposer
from powerinfer_tools.engine.factor_thresholds import FactorThresholds
from powerinfer_tools.engine.from_disk import RamOptions
from powerinfer_tools.engine.layers import LayerStack, Watch
from powerinfer_tools.engine.observation import LayerCounters
from powerinfer_tools.engine.report import DraftReport, EngineReport, Memory, costs_of
from powerinfer_tools.engine.session import Session
from powerinfer_tools.engine.timeline import Timeline
from powerinfer_tools.engine.weights import Weights
from powerinfer_tools.model.loading import Model
from powerinfer_tools.progress import Progress

Floats = npt.NDArray[np.float32]


class WeightsOptions(TypedDict, total=False):
    """What :class:`Weights` takes beside the model."""

    threads: int | None
    context: int | None
    batch: int
    isa: str | None
    mode: str | None
    device: str
    vram: int | None
    kv_type: str
    observed: Sequence[LayerCounters | None] | None
    check_recall: bool
    thresholds: Sequence[FactorThresholds] | None
    ram: RamOptions | None
    beside: Weights | None
    progress: Progress | None


class Engine(Closing):
    """Runs one model for one session: :class:`Weights` made with ``options``, and the session of their
    longest context. Given ``weights``, it shares them, and leaves them open; ``session`` is then one of
    theirs (None: a new one)."""

    def __init__(
        self,
        model: Model,
        *,
        weights: Weights | None = None,
        session: Session | None = None,
        **options: Unpack[WeightsOptions],
    ) -> None:
        self._owns = weights is None
        #: What verifies drafts, where that was asked for.
        self.drafter: Drafter | None = None
        self.weights = Weights(model, **options) if weights is None else weights
        self._model = model
        try:
            self.session = self.weights.session() if session is None else session
        except BaseException:
            if self._owns:
                self.weights.close()
            raise

    @property
    def model(self) -> Model:
        """The model."""
        return self._model

    @property
    def context(self) -> int:
        """How many tokens fit."""
        return self.session.context

    @property
    def position(self) -> int:
        """Tokens in the KV cache."""
        return self.session.position if self.drafter is None else self.drafter.position

    def draft_with(self, proposer: Proposer) -> None:
        """Verify the drafts of ``proposer`` from now on, which is closed with the engine: the same text, in
        fewer passes. Raises ModelError where that cannot be, having closed it."""
        self.session.rewind(0)
        try:
            self.drafter = Drafter(self.session, proposer)
        except BaseException:
            proposer.close()
            raise

    @property
    def vocabulary(self) -> int:
        """Number of logits."""
        return self.weights.vocabulary

    @property
    def threads(self) -> int:
        """Threads that compute."""
        return self.weights.pool.threads

    @property
    def batch(self) -> int:
        """Largest number of prompt tokens processed at a time."""
        return self.weights.batch

    def read_bandwidth(self) -> float:
        """Measure the machine's read bandwidth with the engine's own threads, in bytes per second."""
        return self.weights.read_bandwidth()

    @property
    def notices(self) -> Sequence[str]:
        """What could not be done as asked, and what is done instead: each once, in words for the user."""
        return self.weights.notices

    def trace(self) -> Timeline:
        """Keep a timeline of every token that is decoded from now on, and forget that of the one before."""
        timeline = self.stack.timeline
        if timeline is None:
            timeline = self.stack.timeline = Timeline()
        return timeline

    @property
    def stack(self) -> LayerStack:
        """The layers, for stages that look inside (profile)."""
        return self.weights.stack

    def prefill(self, tokens: Sequence[int], progress: Progress | None = None) -> Floats:
        """:meth:`Session.prefill`."""
        return (self.drafter or self.session).prefill(tokens, progress)

    def decode(self, token: int) -> Floats:
        """:meth:`Session.decode`."""
        return (self.drafter or self.session).decode(token)

    def logits(self, tokens: Sequence[int]) -> Iterator[Floats]:
        """Process ``tokens`` after what is held; logits (k, vocabulary) after each of them, some at a time,
        each array valid until the next is asked for. Raises as :meth:`prefill` does."""
        if self.drafter is not None:
            return self.drafter.logits(tokens)
        return self.session.logits_from(tokens, 0)

    def fork(self) -> "Engine":
        """Another engine on these weights whose session holds the same tokens; it makes no drafts. Raises
        ModelError where memory does not suffice."""
        if self.drafter is not None:
            self.drafter.settle()
        return Engine(self._model, weights=self.weights, session=self.session.fork())

    def score(self, tokens: Sequence[int], first: int = 0) -> Iterator[Floats]:
        """Logits (k, vocabulary) of successive positions from ``first`` on, for a fresh window of ``tokens``.

        Forgets the cache. Each array is valid until the next one is asked for.
        """
        self.rewind(0)
        return self.session.logits_from(tokens, first)

    def absorb(self, tokens: Sequence[int], watch: Watch | None = None) -> None:
        """Run a fresh window of ``tokens`` through the layers alone, for the sake of the counters.

        ``watch`` is called after the FFN of every layer, see :meth:`LayerStack.forward_watched`; it needs a
        source model and a window of one batch.
        """
        self.rewind(0)
        session = self.session
        session.require_room(len(tokens))
        if watch is not None:
            assert len(tokens) <= self.batch
            places = Places.of_one(session.state, 0, len(tokens))
            session.position += self.stack.forward_watched(tokens, places, watch)
            return
        for first in range(0, len(tokens), self.batch):
            count = session.forward(tokens[first : first + self.batch])
            require_finite(self.stack.x[:count], self.model)

    def rewind(self, position: int) -> int:
        """:meth:`Session.rewind`."""
        return (self.drafter or self.session).rewind(position)

    def report(self) -> EngineReport:
        """Counters since the engine was made."""
        stack, counters, head = self.stack, self.session.counters, self.weights.head
        decoded = counters.decode_tokens
        cache_bytes = counters.cache_bytes / decoded if decoded else 0.0
        passes = counters.decode_passes / decoded if decoded else 1.0
        timings = stack.seconds() | ({"head": head.seconds} if head else {})
        routing = self.model.hyper.routing
        prediction_cost, threshold_cost = costs_of(self.model, stack.modes)
        return EngineReport(
            model=self.model.name,
            path=str(self.model.path),
            mode=stack.mode,
            device=stack.device,
            threads=self.threads,
            isa=self.weights.pool.isa,
            prompt_tokens=counters.prompt_tokens,
            prompt_seconds=counters.prompt_seconds,
            decode_tokens=counters.decode_tokens,
            decode_seconds=counters.decode_seconds,
            bytes_per_token=stack.weight_bytes_per_token() * passes + cache_bytes,
            density=stack.density(),
            experts=(routing.used, routing.experts) if routing else None,
            recall=stack.recall(),
            recall_by_layer=stack.recall_by_layer(),
            predicted_density=stack.predicted_density(),
            prediction_cost=prediction_cost,
            threshold_cost=threshold_cost,
            drafts=DraftReport.of(self.drafter) if self.drafter is not None else None,
            timings=timings,
            kv_type=self.session.kv_type,
            load_seconds=self.weights.load_seconds,
            disk=stack.residency.report() if stack.residency else None,
            memory=Memory(
                weights=stack.weight_bytes,
                kv_cache=self.session.nbytes,
                scratch=stack.scratch_bytes + (head.nbytes if head else 0),
                vram=stack.vram_bytes,
                vram_peak=stack.vram_peak_bytes,
            ),
        )

    def close(self) -> None:
        """Give everything back that the engine has made. It cannot be used afterwards."""
        if self.drafter is not None:
            self.drafter.close()
        if self._owns:
            self.weights.close()
        else:
            self.session.close()
