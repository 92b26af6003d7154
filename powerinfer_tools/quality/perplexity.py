"""How good a model's predictions are: perplexity, and divergence from the dense source."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from powerinfer_tools.engine import Engine
from powerinfer_tools.errors import CorpusError, ModelError
from powerinfer_tools.model.loading import Model
from powerinfer_tools.progress import Progress, Silent

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of a text. ``running``: its value after each window. ``tokens``: how many were scored."""

    perplexity: float
    standard_error: float
    chunks: int
    tokens: int
    context: int
    running: tuple[float, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return vars(self) | {"running": list(self.running)}


@dataclass(frozen=True)
class Divergence:
    """How much a model differs from another over the same positions.

    ``mean_kl`` is the mean of KL(base ‖ model) in nats, ``same_top`` the share of positions where both would
    choose the same token greedily, ``ratio`` the model's perplexity over the base's, ``identical`` whether
    all logits have the same bits. Errors are standard errors of the means, as if positions were independent.
    The ratio's error is the error of the mean of paired differences, so it is much smaller than the errors of
    the two perplexities.
    """

    mean_kl: float
    kl_error: float
    max_kl: float
    same_top: float
    same_top_error: float
    positions: int
    perplexity: float
    perplexity_error: float
    base_perplexity: float
    ratio: float
    ratio_error: float
    identical: bool

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dict(vars(self))


class Scorer(Protocol):
    """A source of logits for windows of text: an engine, or one of several ways of running one."""

    @property
    def model(self) -> Model:
        """The model."""

    @property
    def vocabulary(self) -> int:
        """The number of logits."""

    def score(self, tokens: Sequence[int], first: int = 0) -> Iterator[Floats]:
        """Logits (k, vocabulary) of successive positions from ``first`` on, for a fresh window of
        ``tokens``."""


def windows(tokens: Sequence[int], context: int, chunks: int | None, bos: int | None) -> list[list[int]]:
    """Non-overlapping windows of ``context`` tokens; with ``bos``, it replaces the first token of each.

    This is how llama.cpp's perplexity counts. Raises CorpusError for a text shorter than one window.
    """
    count = len(tokens) // context
    if chunks is not None:
        count = min(count, chunks)
    if count < 1:
        raise CorpusError(
            f"the text has {len(tokens)} tokens, fewer than one window of {context}; "
            "give more text or a smaller --ctx"
        )
    pieces = [list(tokens[i * context : (i + 1) * context]) for i in range(count)]
    return [[bos, *piece[1:]] for piece in pieces] if bos is not None else pieces


def perplexity(engine: Scorer, pieces: Sequence[list[int]], progress: Progress | None = None) -> Perplexity:
    """Perplexity over ``pieces`` (from :func:`windows`): the second half of each is scored.

    exp of the mean of -ln p(token | the tokens of its window before it). Forgets the engine's cache.
    """
    progress = progress or Silent()
    progress.start("perplexity", sum(map(len, pieces)), "tokens")
    losses: list[Doubles] = []
    running = []
    for piece in pieces:
        losses.append(
            np.concatenate([_losses(logits, targets) for logits, targets in _scored(engine, piece)])
        )
        running.append(math.exp(np.concatenate(losses).mean()))
        progress.advance(len(piece))
    progress.finish()
    every = np.concatenate(losses)
    return Perplexity(
        running[-1], running[-1] * _error(every), len(pieces), len(every), len(pieces[0]), tuple(running)
    )


def divergence(
    engine: Scorer, base: Scorer, pieces: Sequence[list[int]], progress: Progress | None = None
) -> Divergence:
    """Divergence of ``engine`` from ``base`` over the scored positions of ``pieces``. ``base`` computes by
    itself or alternates with ``engine``."""
    if engine.vocabulary != base.vocabulary:
        raise ModelError(
            f"{engine.model.path} has {engine.vocabulary} tokens and {base.model.path} {base.vocabulary}: "
            "these models cannot be compared"
        )
    progress = progress or Silent()
    progress.start("divergence", sum(map(len, pieces)), "tokens")
    kl, same, losses, base_losses, identical = [], [], [], [], True
    for piece in pieces:
        for (logits, targets), (base_logits, _) in zip(
            _scored(engine, piece), _scored(base, piece), strict=True
        ):
            identical &= logits.tobytes() == base_logits.tobytes()
            model_log, base_log = log_softmax(logits), log_softmax(base_logits)
            kl.append((np.exp(base_log) * (base_log - model_log)).sum(axis=1))
            same.append(model_log.argmax(axis=1) == base_log.argmax(axis=1))
            losses.append(_losses(logits, targets))
            base_losses.append(_losses(base_logits, targets))
        progress.advance(len(piece))
    progress.finish()
    return _divergence(*map(np.concatenate, (kl, losses, base_losses, same)), identical=identical)


def _divergence(kl: Doubles, losses: Doubles, base: Doubles, same: Bools, *, identical: bool) -> Divergence:
    perplexity, ratio = math.exp(losses.mean()), math.exp((losses - base).mean())
    return Divergence(
        mean_kl=float(kl.mean()),
        kl_error=_error(kl),
        max_kl=float(kl.max()),
        same_top=float(same.mean()),
        same_top_error=_error(same.astype(np.float64)),
        positions=len(kl),
        perplexity=perplexity,
        perplexity_error=perplexity * _error(losses),
        base_perplexity=math.exp(base.mean()),
        ratio=ratio,
        ratio_error=ratio * _error(losses - base),
        identical=identical,
    )


def _error(values: Doubles) -> float:
    """Standard error of the mean of ``values``; 0 for a single one."""
    return float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def log_probabilities(engine: Engine, tokens: Sequence[int], first: int) -> tuple[Doubles, Bools]:
    """ln p(tokens[i] | tokens before it) for every i from ``first`` ≥ 1 on: float64 [n], and whether each
    token was the likeliest, bool [n]. Forgets the engine's cache."""
    position, logs, likeliest = first - 1, [], []
    for logits in engine.score(tokens[:-1], position):
        targets = np.asarray(tokens[position + 1 : position + 1 + len(logits)], dtype=np.int64)
        logs.append(-_losses(logits, targets))
        likeliest.append(logits.argmax(axis=1) == targets)
        position += len(logits)
    return np.concatenate(logs), np.concatenate(likeliest)


def _scored(engine: Scorer, piece: list[int]) -> Iterator[tuple[Floats, npt.NDArray[np.int64]]]:
    """Logits of the scored positions with the token that follows each: positions len/2 … len-2."""
    first = len(piece) // 2
    position = first
    for logits in engine.score(piece, first):
        rows = logits[: len(piece) - 1 - position]
        if len(rows):
            yield rows, np.asarray(piece[position + 1 : position + 1 + len(rows)], dtype=np.int64)
        position += len(logits)


def _losses(logits: Floats, targets: npt.NDArray[np.int64]) -> Doubles:
    highest = logits.max(axis=1, keepdims=True)
    total = np.exp((logits - highest).astype(np.float32)).sum(axis=1, dtype=np.float64)
    chosen = logits[np.arange(len(targets)), targets].astype(np.float64) - highest[:, 0]
    losses: Doubles = np.log(total) - chosen
    if not np.isfinite(losses).all():
        raise ModelError("the model's logits are not finite: its weights are damaged")
    return losses


def log_softmax(logits: Floats) -> Doubles:
    """ln softmax over the last axis of ``logits`` (k, vocabulary)."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    result: Doubles = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result
