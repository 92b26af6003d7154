"""Profiles of made-up activity, counted the plain way: one token after the other."""

from typing import Any

import numpy as np

from powerinfer_formats.histogram import BINS, contribution_bins
from powerinfer_formats.profile import ROUTING, Corpus, ExpertSums, LayerSums, Profile, round_squares

LAYERS, NEURONS, WINDOW = 2, 24, 16


def activity(seed: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """act(gate) and up of every layer: float32 [layers, tokens, neurons], a third of act(gate) zero."""
    rng = np.random.default_rng(seed)
    shape = (LAYERS, tokens, NEURONS)
    scale = np.exp(rng.standard_normal((LAYERS, 1, NEURONS)) * 2)
    gate = rng.standard_normal(shape) * scale * (rng.random(shape) > 1 / 3)
    return gate.astype(np.float32), rng.standard_normal(shape).astype(np.float32)


def sums_of(gate: np.ndarray, up: np.ndarray, *, exact_zeros: bool) -> LayerSums:
    """Sums of one layer over [tokens, neurons], window by window."""
    contribution = np.abs(gate * up)
    histogram = np.zeros((NEURONS, BINS), np.uint32)
    for bins in contribution_bins(contribution):
        histogram[np.arange(NEURONS), bins] += 1
    squares = [
        sum(
            (
                round_squares((x[t : t + WINDOW].astype(np.float64) ** 2).sum(axis=0))
                for t in range(0, len(x), WINDOW)
            ),
            start=np.zeros(NEURONS),
        )
        for x in (gate, up)
    ]
    counts = (contribution != 0).sum(axis=0).astype(np.uint64)
    return LayerSums(
        counts=counts if exact_zeros else None,
        histogram=None if exact_zeros else histogram,
        gate_squares=squares[0],
        up_squares=squares[1],
    )


def make_profile(seed: int = 0, tokens: int = 64, *, exact_zeros: bool = False, **fields: Any) -> Profile:
    gate, up = activity(seed, tokens)
    given: dict[str, Any] = {
        "fingerprint": "ab" * 32,
        "model_name": "tiny",
        "architecture": "llama",
        "activation": "relu" if exact_zeros else "silu",
        "exact_zeros": exact_zeros,
        "tokens": tokens,
        "window": WINDOW,
        "target_density": 0.25,
        "corpus": (Corpus(f"corpus-{seed}.txt", f"{seed:064x}", tokens, 5 * tokens),),
        "tool_version": "0.1.0",
        "sums": tuple(sums_of(gate[i], up[i], exact_zeros=exact_zeros) for i in range(LAYERS)),
    }
    return Profile(**(given | fields))


#: Of :func:`make_expert_profile`: experts, neurons in each, and experts that a token takes.
EXPERTS, INSIDE, USED = 5, 7, 2


def make_expert_profile(seed: int = 0, tokens: int = 64, **fields: Any) -> Profile:
    """A profile of two layers of experts and, first, a dense one; neurons inside experts are counted."""
    rng = np.random.default_rng(seed)
    sums = [LayerSums(np.array([tokens], np.uint64), None, *np.full((2, 1), float(tokens)))]
    for _ in range(2):
        chosen = np.argsort(rng.random((tokens, EXPERTS)), axis=1)[:, :USED]
        counts = np.bincount(chosen.ravel(), minlength=EXPERTS).astype(np.uint64)
        active = np.zeros((EXPERTS, INSIDE), np.uint32)
        for expert in chosen.ravel():
            active[expert] += rng.random(INSIDE) < 0.4
        squares = (counts * 0.25, counts.astype(np.float64))
        sums.append(LayerSums(counts, None, *squares, ExpertSums(counts.copy(), active)))
    given: dict[str, Any] = {"activation": ROUTING, "sums": tuple(sums)}
    return make_profile(seed, tokens, exact_zeros=True, **(given | fields))
