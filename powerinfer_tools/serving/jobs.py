"""One generation as the batcher takes it, and what comes out of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from powerinfer_tools.generate.constraints import Grammar
from powerinfer_tools.generate.generation import GenerationOptions, Outcome

Logits = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Job:
    """Continue ``prompt``. ``client`` is whose turn it takes in the queue.

    ``bias`` is added to logits by token. ``top_logprobs`` None gives no probabilities, 0 the chosen token's
    alone. ``score_prompt``: also the probability of every prompt token. ``grammar`` is what the text must
    keep to. ``reuse``: whether what an earlier request left in a cache may be used.
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
    """One token was generated. ``text`` is what it completes, which may be nothing."""

    token: int
    text: str
    score: TokenScore | None


@dataclass(frozen=True)
class PromptScores:
    """ln p of each prompt token; of the first one None."""

    scores: tuple[TokenScore | None, ...]


@dataclass(frozen=True)
class Ended:
    """The text has ended; ``rest`` is what was held back. Times in seconds."""

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
