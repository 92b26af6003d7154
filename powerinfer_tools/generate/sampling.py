"""Choosing the next token from logits, in llama.cpp's order and with its defaults.

Order: logit bias → repeat, frequency and presence penalty → top-k → typical-p → top-p → min-p → temperature
→ draw. On request, the steps between the bias and the draw come in another order, or are left out. Each step
sees the tokens that the one before it left. Numpy only; independent of engines and text.
"""

import math
from collections import Counter, deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from powerinfer_tools.errors import SamplingError
from powerinfer_tools.generate.sampler_names import DEFAULT_SAMPLERS, sampler_chain

Logits = npt.NDArray[np.float32]
_Scores = npt.NDArray[np.float64]
_Ids = npt.NDArray[np.int64]

#: Scores beyond this are practically certain.
_LARGE = 1e8
_RANGES: dict[str, tuple[float, float, str]] = {
    "temperature": (-math.inf, math.inf, "a number (0 or less is greedy)"),
    "top_k": (-math.inf, math.inf, "a whole number (0 or less is off)"),
    "typical_p": (0.0, 1.0, "between 0 and 1 (off)"),
    "top_p": (0.0, 1.0, "between 0 and 1 (off)"),
    "min_p": (0.0, 1.0, "between 0 (off) and 1"),
    "repeat_penalty": (1e-3, 1e3, "between 0.001 and 1000 (1 is off)"),
    "repeat_last_n": (-1, 2**31 - 1, "-1 (all tokens), 0 (off) or up to 2^31 - 1"),
    "frequency_penalty": (-1e3, 1e3, "between -1000 and 1000 (0 is off)"),
    "presence_penalty": (-1e3, 1e3, "between -1000 and 1000 (0 is off)"),
    "seed": (-1, 2**64 - 1, "-1 (a fresh one), or between 0 and 2^64 - 1"),
}


@dataclass(frozen=True)
class SamplingOptions:
    """How to choose a token. Raises SamplingError, naming the option, for a value out of range.

    temperature 0 or less is greedy: the highest logit that penalties and filters leave (only typical_p may
    take out the highest), the lowest id among equals. seed None or -1 draws a fresh seed, given by
    `Sampler.seed`. logit_bias: pairs of a token id and a value added to its logit before everything else;
    -inf rules the token out. samplers: those applied, in this order; options of others have no effect.
    """

    temperature: float = 0.8
    top_k: int = 40
    typical_p: float = 1.0
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    samplers: tuple[str, ...] = DEFAULT_SAMPLERS

    def __post_init__(self) -> None:
        for name, (low, high, meaning) in _RANGES.items():
            value = getattr(self, name)
            if value is None and name == "seed":
                continue
            whole = name in ("top_k", "repeat_last_n", "seed")
            if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
                raise SamplingError(f"{name} is {value!r}, expected a {'whole ' if whole else ''}number")
            if not (low <= value <= high) or math.isinf(value):
                raise SamplingError(f"{name} is {value}, expected {meaning}")
        for token, bias in self.logit_bias:
            if not 0 <= token < 1 << 31 or math.isnan(bias) or bias == math.inf:
                raise SamplingError(f"logit_bias of token {token} is {bias}: expected an id and a number")
        object.__setattr__(self, "samplers", sampler_chain(self.samplers))

    @property
    def greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature <= 0 and "temperature" in self.samplers

    @property
    def takes_highest(self) -> bool:
        """Whether the highest logit is taken whatever the others are: sampling is greedy, no filter takes out
        the likeliest token, and penalties, if any, come first."""
        return self.greedy and self.typical_p >= 1 and "penalties" not in self.samplers[1:]

    @property
    def penalises(self) -> bool:
        """Whether earlier tokens change the logits at all."""
        changes = self.repeat_penalty != 1 or self.frequency_penalty != 0 or self.presence_penalty != 0
        return changes and self.repeat_last_n != 0


class Sampler:
    """Draws tokens one after another.

    State: the tokens accepted so far (as many as penalties look back) and a PCG64 generator, from which each
    draw takes one double; a greedy choice takes none. Equal options, tokens and logits give equal choices.
    `banned` tokens are never chosen.
    """

    def __init__(self, options: SamplingOptions, *, banned: Collection[int] = ()) -> None:
        self.options = options
        self.seed = (
            options.seed
            if options.seed not in (None, -1)
            else int(np.random.SeedSequence().generate_state(1)[0])
        )
        self._random = np.random.Generator(np.random.PCG64(self.seed))
        self._recent: deque[int] = deque(maxlen=options.repeat_last_n if options.repeat_last_n >= 0 else None)
        self._banned = np.array(sorted(banned), np.int64)
        self._never = frozenset(banned)
        #: Whether the highest of the unchanged logits is taken, unless its token is banned.
        self._takes_first = options.takes_highest and not options.penalises and not options.logit_bias

    def accept(self, tokens: Iterable[int]) -> None:
        """Add tokens to the text, prompt included, on which penalties are based."""
        self._recent.extend(tokens)

    def sample(self, logits: Logits) -> int:
        """The next token. logits: float32 [vocabulary], not changed; -inf rules a token out.

        Raises SamplingError for NaN, +inf, or when every token is ruled out.
        """
        if self._takes_first:  # nothing needs to be copied
            best = int(logits.argmax())
            if math.isfinite(logits[best]) and best not in self._never:
                return best
        logits = self._adjusted(logits)
        best = int(np.argmax(logits))  # a NaN counts as the highest
        if not math.isfinite(logits[best]):
            raise SamplingError(_describe_fault(logits))
        if self.options.takes_highest:
            return best
        ids, p = self._filtered(logits)
        if self.options.greedy:
            return int(ids[0])
        cumulative = np.cumsum(p)
        # The first token whose cumulated probability exceeds the draw; one of probability 0 never does.
        place = int(np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right"))
        return int(ids[min(place, len(ids) - 1)])

    def probabilities(self, logits: Logits) -> tuple[_Ids, _Scores]:
        """The tokens that `sample` may return, best first, with their probabilities; nothing is drawn."""
        return self._filtered(self._adjusted(logits))

    def _adjusted(self, logits: Logits) -> Logits:
        penalises = self._penalises and self.options.samplers[:1] == ("penalties",)
        if not penalises and not len(self._banned) and not self.options.logit_bias:
            return logits
        logits = logits.copy()
        for token, bias in self.options.logit_bias:
            if token >= len(logits):
                raise SamplingError(f"logit_bias names token {token}, the model has {len(logits)}")
            logits[token] += np.float32(bias)
        if penalises:
            penalise(logits, self._recent, self.options)
        logits[self._banned] = -np.inf
        return logits

    @property
    def _penalises(self) -> bool:
        return self.options.penalises and len(self._recent) > 0

    def _filtered(self, logits: Logits) -> tuple[_Ids, _Scores]:
        """The tokens that the samplers leave, best first, with their probabilities. Penalties that come first
        are already in ``logits``."""
        options, names = self.options, self.options.samplers
        names = names[1:] if names[:1] == ("penalties",) else names
        first = names[:1] == ("top_k",)
        ids = highest(logits, max(0, options.top_k) if first else 0)
        scores = logits[ids].astype(np.float64)
        for at, name in enumerate(names[first:], first + 1):
            if name == "penalties":
                ids, scores = self._penalised(ids, scores)
            elif name == "temperature":
                judged = "penalties" in names[at:]
                ids, scores = _tempered(ids, scores, options.temperature, keep_size=judged)
            else:
                keep = _filter(name, scores, options)
                ids, scores = ids[keep], scores[keep]
        return ids, softmax(scores)

    def _penalised(self, ids: _Ids, scores: _Scores) -> tuple[_Ids, _Scores]:
        """Apply penalties to the tokens that are left, and sort these again, best first."""
        if not self._penalises:
            return ids, scores
        place = {int(token): at for at, token in enumerate(ids)}
        recent = [place[token] for token in self._recent if token in place]
        with np.errstate(over="ignore"):
            lowered = scores.astype(np.float32)
        penalise(lowered, recent, self.options)
        order = np.lexsort((ids, -lowered))
        return ids[order], lowered[order].astype(np.float64)


def _filter(name: str, scores: _Scores, options: SamplingOptions) -> _Ids:
    """Places of the tokens that the filter called ``name`` keeps; scores come best first."""
    match name:
        case "top_k":
            return np.arange(min(options.top_k, len(scores)) if options.top_k > 0 else len(scores))
        case "typ_p":
            return typical(scores, options.typical_p)
        case "top_p":
            return nucleus(scores, options.top_p)
        case _:
            return above_share_of_best(scores, options.min_p)


def _tempered(ids: _Ids, scores: _Scores, temperature: float, *, keep_size: bool) -> tuple[_Ids, _Scores]:
    """Scores at a temperature, minus the best one unless ``keep_size`` is set; for a temperature of 0 or
    less, the best score alone."""
    if temperature <= 0:
        return ids[:1], scores[:1]
    best = scores.max()
    # Differences to the best: a tiny temperature makes the others impossible, and nothing infinite.
    with np.errstate(over="ignore"):
        tempered = (scores - best) / temperature
        return ids, tempered + np.clip(best / temperature, -_LARGE, _LARGE) if keep_size else tempered


def penalise(logits: Logits, recent: Collection[int], options: SamplingOptions) -> None:
    """Lower in place the logits of tokens that occur in `recent`.

    A positive logit is divided by the repeat penalty, another multiplied by it; then the frequency penalty
    times the number of occurrences and the presence penalty are subtracted.
    """
    counts = Counter(recent)
    tokens = np.fromiter(counts.keys(), np.int64, len(counts))
    times = np.fromiter(counts.values(), np.float32, len(counts))
    old = logits[tokens]
    repeat = np.float32(options.repeat_penalty)
    lowered = np.where(old > 0, old / repeat, old * repeat)
    lowered -= times * np.float32(options.frequency_penalty) + np.float32(options.presence_penalty)
    logits[tokens] = lowered


def highest(logits: Logits, count: int) -> _Ids:
    """Ids of the `count` highest logits (0: of all) above -inf, best first, the lowest id first among equals.

    Exact and the same on every machine. A plain argpartition is not if logits are equal at the border.
    """
    if count == 0 or count >= len(logits):
        candidates = np.flatnonzero(logits > -np.inf)
    else:
        candidates = np.flatnonzero(logits >= _lower_bound(logits, count))
        candidates = candidates[logits[candidates] > -np.inf]
    order = np.argsort(-logits[candidates], kind="stable")
    return candidates[order][: count or None]


def _lower_bound(logits: Logits, count: int) -> np.float32:
    """A value that at least `count` logits reach, and few more than `count`.

    The count-th highest among the maxima of separate groups is such a value, and finding it takes one cheap
    pass over a large vocabulary.
    """
    groups = 16 * count
    rows = len(logits) // groups
    if rows < 2:
        return np.float32(np.partition(logits, len(logits) - count)[len(logits) - count])
    maxima = logits[: rows * groups].reshape(rows, groups).max(axis=0)
    return np.float32(np.partition(maxima, groups - count)[groups - count])


def softmax(scores: _Scores) -> _Scores:
    """exp(s_i) / Σ exp(s_j), in float64, without overflow."""
    weights = np.exp(scores - scores.max())
    result: _Scores = weights / weights.sum()
    return result


def typical(scores: _Scores, share: float) -> _Ids:
    """Places of the tokens whose surprise is nearest to the entropy, until their probability exceeds `share`.

    Locally typical sampling (Meister et al. 2022, arXiv:2202.00666). The places come in their old order.
    """
    if share >= 1:
        return np.arange(len(scores))
    p = softmax(scores)
    surprise = -np.log(np.maximum(p, np.finfo(np.float64).tiny))
    order = np.argsort(np.abs(surprise - (p * surprise).sum()), kind="stable")
    needed = int(np.searchsorted(np.cumsum(p[order]), share, side="right")) + 1
    return np.sort(order[:needed])


def nucleus(scores: _Scores, share: float) -> _Ids:
    """Places of the best tokens (scores come best first) until their probability reaches `share`: top-p."""
    if share >= 1:
        return np.arange(len(scores))
    needed = int(np.searchsorted(np.cumsum(softmax(scores)), share, side="left")) + 1
    return np.arange(min(needed, len(scores)))


def above_share_of_best(scores: _Scores, share: float) -> _Ids:
    """Places of tokens at least `share` times as probable as the best one: min-p."""
    if share <= 0:
        return np.arange(len(scores))
    return np.flatnonzero(scores >= scores[0] + math.log(share))


def _describe_fault(logits: Logits) -> str:
    for fault, where in (("NaN", np.isnan(logits)), ("+inf", np.isposinf(logits))):
        if where.any():
            return (
                f"the logits cannot be sampled: {int(where.sum())} of {len(logits)} are {fault}, "
                f"first that of token {int(np.argmax(where))}; the model file may be damaged"
            )
    return f"the logits cannot be sampled: all {len(logits)} tokens are ruled out (-inf)"
