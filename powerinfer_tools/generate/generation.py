"""Generating text: from a prompt's ids to pieces of text, with every way to end it.

Works with any object that has the engine's few methods, and is independent of models and kernels.
"""

import time
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

import numpy as np
import numpy.typing as npt

from powerinfer_tools.errors import PowerInferError
from powerinfer_tools.generate.sampling import Sampler, SamplingOptions
from powerinfer_tools.progress import Progress
from powerinfer_tools.text.stop_strings import StopStrings
from powerinfer_tools.text.tokenizer import Tokenizer

Logits = npt.NDArray[np.float32]


class TokenEngine(Protocol):
    """The methods of an engine that generating needs."""

    @property
    def context(self) -> int:
        """How many tokens fit."""
        ...

    @property
    def position(self) -> int:
        """How many tokens are in the KV cache."""
        ...

    def prefill(self, tokens: Sequence[int], progress: Progress | None = None) -> Logits:
        """Process a prompt; logits after its last token. Raises ContextFull."""
        ...

    def decode(self, token: int) -> Logits:
        """Logits after one more token, valid until the next call."""
        ...

    def rewind(self, position: int) -> int:
        """Forget the KV cache from `position` on, or from an earlier position; returns how many tokens
        remain."""
        ...


class Outcome(StrEnum):
    """Why a generation ended."""

    END = "end"
    STOP_STRING = "stop"
    LIMIT = "limit"
    CONTEXT_FULL = "context"
    INTERRUPTED = "interrupted"


@dataclass(frozen=True)
class GenerationOptions:
    """How to generate. max_tokens -1: until the model ends; ignore_eos: end tokens are never chosen."""

    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    max_tokens: int = -1
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    show_special: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens < -1:
            raise PowerInferError(
                f"the number of tokens is {self.max_tokens}, expected -1 (no limit) or more"
            )
        if "" in self.stop:
            raise PowerInferError("a stop string is empty: it would end every text at once")


@dataclass(frozen=True)
class Piece:
    """A piece of generated text. `token` is the token that completed it; the last piece has none."""

    text: str
    token: int | None


@dataclass
class Statistics:
    """What a generation has cost so far. Seconds are wall time; sampling includes turning ids into text."""

    prompt_tokens: int = 0
    reused_tokens: int = 0
    tokens: int = 0
    decoded: int = 0
    prompt_seconds: float = 0.0
    decode_seconds: float = 0.0
    sampling_seconds: float = 0.0
    first_token_seconds: float | None = None

    @property
    def prompt_tokens_per_second(self) -> float:
        """Speed of prompt processing; 0 before any."""
        return self.prompt_tokens / self.prompt_seconds if self.prompt_seconds > 0 else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Speed of decoding; 0 before any."""
        return self.decoded / self.decode_seconds if self.decode_seconds > 0 else 0.0


def logits_hash(logits: Logits) -> str:
    """CRC-32 of the little-endian float32 bytes, as "#%08x": a change of any bit shows in every run."""
    return f"#{zlib.crc32(np.ascontiguousarray(logits, '<f4').tobytes()):08x}"


class Generation(Iterator[Piece]):
    """One generation under way: iterate for pieces of text, `close` to stop early.

    tokens: generated ids, without an end token. text: the text so far. fed: ids that this generation has put
    into the engine's cache. outcome: None while it runs. However it ends, the engine can be used again:
    rewind it to a position of at most its earlier position plus len(fed).
    """

    def __init__(
        self,
        engine: TokenEngine,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        options: GenerationOptions,
        *,
        sampler: Sampler | None = None,
        progress: Progress | None = None,
        on_end: Callable[["Generation"], None] | None = None,
    ) -> None:
        if not prompt_ids:
            raise PowerInferError("the prompt is empty, and this model has no token to begin a text with")
        self.options = options
        self.tokens: list[int] = []
        self.fed: list[int] = []
        self.text = ""
        self.outcome: Outcome | None = None
        self.stop_string: str | None = None
        self.logits_hash: str | None = None
        self.statistics = Statistics(reused_tokens=engine.position)
        self.sampler = sampler or new_sampler(tokenizer, options)
        self._engine = engine
        self._tokenizer = tokenizer
        self._on_end = on_end
        self._logits: Logits | None = None
        self._pieces = self._run(list(prompt_ids), progress)

    def __next__(self) -> Piece:
        return next(self._pieces)

    def close(self) -> None:
        """Stop here; the outcome is INTERRUPTED unless the text had ended."""
        self._pieces.close()
        self._finish()  # a generator that never started does not run its own `finally`

    @property
    def explanation(self) -> str:
        """Why it ended, in words for the user."""
        return {
            None: "still running",
            Outcome.END: "the model ended its text",
            Outcome.STOP_STRING: f"stop string {self.stop_string!r}",
            Outcome.LIMIT: f"the limit of {self.options.max_tokens} tokens (-n) is reached",
            Outcome.CONTEXT_FULL: f"the context is full: {self._engine.context} tokens; -c sets a larger one",
            Outcome.INTERRUPTED: "interrupted",
        }[self.outcome]

    def _run(self, prompt: list[int], progress: Progress | None) -> Generator[Piece, None, None]:
        try:
            self._prefill(prompt, progress)
            yield from self._decode()
        finally:
            self._finish()

    def _prefill(self, prompt: list[int], progress: Progress | None) -> None:
        started = time.perf_counter()
        self._logits = self._engine.prefill(prompt, progress)
        self.fed += prompt
        self.statistics.prompt_seconds = time.perf_counter() - started
        self.statistics.prompt_tokens = len(prompt)
        self.sampler.accept(prompt)

    def _decode(self) -> Generator[Piece, None, None]:
        stream = self._tokenizer.stream(show_special=self.options.show_special)
        stops = StopStrings(self.options.stop)
        while (token := self._choose()) is not None:
            text = stops.push(stream.push(token))
            self.text += text
            self.stop_string = stops.found
            self.outcome = self._ended()
            yield Piece(text, token)
            if self.outcome is not None:
                break
            self._feed(token)
        rest = "" if stops.found is not None else stops.push(stream.finish()) + stops.finish()
        self.text += rest
        yield Piece(rest, None)

    def _choose(self) -> int | None:
        """The next token; None, with the outcome set, if there is none."""
        started = time.perf_counter()
        statistics = self.statistics
        if self.options.max_tokens == 0:
            self.outcome = Outcome.LIMIT
            return None
        assert self._logits is not None
        token = self.sampler.sample(self._logits)
        if token in self._tokenizer.eos_ids:
            self.outcome = Outcome.END
            return None
        self.tokens.append(token)
        self.sampler.accept((token,))
        statistics.tokens = len(self.tokens)
        statistics.sampling_seconds += time.perf_counter() - started
        if statistics.first_token_seconds is None:
            statistics.first_token_seconds = statistics.prompt_seconds + statistics.sampling_seconds
        return token

    def _ended(self) -> Outcome | None:
        if self.stop_string is not None:
            return Outcome.STOP_STRING
        if 0 <= self.options.max_tokens <= len(self.tokens):
            return Outcome.LIMIT
        if self._engine.position >= self._engine.context:
            return Outcome.CONTEXT_FULL
        return None

    def _feed(self, token: int) -> None:
        started = time.perf_counter()
        self._logits = None  # the engine overwrites them: an interrupt there must not leave a wrong hash
        self._logits = self._engine.decode(token)
        self.fed.append(token)
        self.statistics.decoded += 1
        self.statistics.decode_seconds += time.perf_counter() - started

    def _finish(self) -> None:
        if self._logits is not None:
            self.logits_hash = logits_hash(self._logits)
            self._logits = None
        if self.outcome is None:
            self.outcome = Outcome.INTERRUPTED
        if self._on_end is not None:
            on_end, self._on_end = self._on_end, None
            on_end(self)


def new_sampler(tokenizer: Tokenizer, options: GenerationOptions) -> Sampler:
    """A sampler for these options; with ignore_eos it never chooses an end token."""
    return Sampler(options.sampling, banned=tokenizer.eos_ids if options.ignore_eos else ())


def generate(
    engine: TokenEngine,
    tokenizer: Tokenizer,
    prompt_ids: Sequence[int],
    options: GenerationOptions | None = None,
    *,
    progress: Progress | None = None,
) -> Generation:
    """Continue `prompt_ids` after the tokens in the engine's cache.

    Raises PowerInferError for an empty prompt; iterating raises ContextFull if the prompt does not fit.
    A context that fills up while generating is an outcome, not an error.
    """
    return Generation(engine, tokenizer, prompt_ids, options or GenerationOptions(), progress=progress)
