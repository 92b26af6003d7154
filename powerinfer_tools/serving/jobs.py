"""The batcher's input, one generation, and its output, the events of that generation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from powerinfer_tools.generate.constraints import Grammar
from powerinfer_tools.generate.generation import GenerationOptions, Outcome

Logits = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Job:
    """Continue ``prompt``. The job takes a turn of ``client`` in the queue.

    ``bias`` is added to logits by token. ``top_logprobs`` None gives no probabilities, 0 the chosen token's
    alone. ``score_prompt``: also the probability of every prompt token. ``grammar`` constrains the text.
    ``reuse``: whether the cached tokens of an earlier request may be used.
    """

    prompt: Sequence[int]
    options: GenerationOptions
    client: str = ""
    bias: Mapping[int, float] = field(default_factory=dict)
    top_logprobs: int | None = None
    score_prompt: bool = False
    grammar: Grammar | None = None
    reuse: bool = True


@dataclass(frozen=True)
class TokenScore:
    """ln p of one token, and of the likeliest ones in its place, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Token:
    """One token was generated. ``text`` is the text that it completes, which may be empty."""

    token: int
    text: str
    score: TokenScore | None


@dataclass(frozen=True)
class PromptScores:
    """ln p of each prompt token; None for the first one."""

    scores: tuple[TokenScore | None, ...]


@dataclass(frozen=True)
class Ended:
    """The text has ended; ``rest`` is the text that was held back. Times in seconds."""

    outcome: Outcome
    rest: str
    stop_string: str | None
    logits_hash: str | None
    seed: int
    prompt_tokens: int
    reused_tokens: int
    tokens: int
    wait_seconds: float
    prompt_seconds: float
    decode_seconds: float


@dataclass(frozen=True)
class Failed:
    """The text could not be generated."""

    error: Exception


Event = Token | PromptScores | Ended | Failed
