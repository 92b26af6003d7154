"""An engine as a language model of ``lm-eval``: log-likelihoods of continuations, and greedy generation."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from lm_eval.api.model import LM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from powerinfer_tools.engine import Engine
from powerinfer_tools.errors import EvaluationError
from powerinfer_tools.generate.generation import GenerationOptions, generate
from powerinfer_tools.generate.sampling import SamplingOptions
from powerinfer_tools.progress import Progress, Silent
from powerinfer_tools.quality.perplexity import log_probabilities
from powerinfer_tools.text import Tokenizer

#: Tokens to generate if a task does not say: lm-eval's own number.
_GENERATED = 256


class PowerInferLM(LM):  # type: ignore[misc]  # lm-eval ships no types
    """Answers lm-eval's requests with ``engine``; the model's own ``tokenizer`` turns texts into tokens.

    A text that is longer than the engine's context loses its beginning.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, progress: Progress | None = None) -> None:
        super().__init__()
        self.engine, self.tokenizer, self.progress = engine, tokenizer, progress or Silent()

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """ln p(continuation | context), and whether greedy decoding would give the continuation."""
        return [self._score(*self._parted(*request.args)) for request in self._counted(requests)]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """ln p(text) of whole texts, in windows of the context that do not overlap."""
        return [self._rolling(*request.args) for request in self._counted(requests)]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The model's continuations, up to a stop string."""
        return [self._generate(*request.args) for request in self._counted(requests)]

    def _counted(self, requests: Sequence[Any]) -> Iterator[Any]:
        self.progress.start("questions", len(requests), "requests")
        for request in requests:
            yield request
            self.progress.advance(1)
        self.progress.finish()

    def _parted(self, context: str, continuation: str) -> tuple[list[int], int]:
        """Ids of both together, and where the continuation begins. Spaces at the end of the context belong to
        the continuation, as they precede its first word."""
        stripped = context.rstrip()
        whole = self._encode(context + continuation)
        # A token that spans the border counts as part of the continuation.
        first = min(len(self._encode(stripped)), len(whole) - 1) if stripped else 0
        start = self._start() if not stripped or self.tokenizer.adds_bos else []
        return start + whole, len(start) + first

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_bos=False)

    def _start(self) -> list[int]:
        """The token in front of a text without a context."""
        tokens = self.tokenizer.tokens
        start = tokens.bos_id if tokens.bos_id is not None else tokens.eos_id
        if start is None:
            raise EvaluationError("this vocabulary has no token to begin a text with")
        return [start]

    def _score(self, ids: list[int], first: int) -> tuple[float, bool]:
        """Sum of ln p over ids[first:], and whether each of these was the likeliest."""
        excess = max(0, len(ids) - 1 - self.engine.context)
        if excess >= first:
            raise EvaluationError(
                f"a continuation of {len(ids) - first} tokens does not fit in the context of "
                f"{self.engine.context}"
            )
        logs, likeliest = log_probabilities(self.engine, ids[excess:], first - excess)
        return float(logs.sum()), bool(likeliest.all())

    def _rolling(self, text: str) -> float:
        windows = get_rolling_token_windows(
            token_list=self._encode(text),
            prefix_token=self._start()[0],
            max_seq_len=self.engine.context,
            context_len=1,
        )
        parts = [make_disjoint_window(window) for window in windows]
        return float(np.sum([self._score([*before, *after], len(before))[0] for before, after in parts]))

    def _generate(self, context: str, arguments: dict[str, Any]) -> str:
        until = arguments.get("until") or []
        stops = (until,) if isinstance(until, str) else tuple(until)
        limit = int(arguments.get("max_gen_toks", _GENERATED))
        if limit >= self.engine.context:
            raise EvaluationError(f"{limit} tokens to generate do not fit in {self.engine.context}")
        warm = float(arguments.get("temperature", 0.0)) if arguments.get("do_sample") else 0.0
        ids = (self._start() if self.tokenizer.adds_bos or not context else []) + self._encode(context)
        options = GenerationOptions(
            sampling=SamplingOptions(temperature=warm, seed=0), max_tokens=limit, stop=stops
        )
        self.engine.rewind(0)
        generation = generate(self.engine, self.tokenizer, ids[-(self.engine.context - limit) :], options)
        for _ in generation:
            pass
        return generation.text
