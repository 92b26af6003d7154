"""The profile: how often each neuron was active over a corpus, and what the corpus was.

Everything in it is a sum over windows of tokens, so profiles of parts of a corpus merge, in any order and
grouping, into exactly the profile of the whole. ``SPEC.md`` has the file byte for byte.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from powerinfer_formats import profile_document as document
from powerinfer_formats.errors import CannotMerge
from powerinfer_formats.histogram import active_counts, lower_edge, threshold_bin
from powerinfer_formats.profile_document import ROUTING, Corpus
from powerinfer_formats.profile_sums import ExpertSums, LayerSums, add_sums, round_squares

__all__ = ["ROUTING", "Corpus", "ExpertSums", "LayerSums", "Profile", "round_squares"]

MAX_TOKENS = (1 << 32) - 1  # what a histogram's uint32 can count


@dataclass(frozen=True, eq=False)
class Profile:
    """Sums over ``tokens`` tokens, ``sums[layer]``, and their origin.

    ``fingerprint`` and ``model_name`` say which model; ``activation`` and ``exact_zeros`` what active means:
    a contribution that is not zero (ReLU family), or one at or above the layer's threshold, chosen so that
    the mean density is nearest to ``target_density``. ``window`` is the number of tokens that were read at
    once; ``corpus`` lists the files that were read.
    """

    fingerprint: str
    model_name: str
    architecture: str
    activation: str
    exact_zeros: bool
    tokens: int
    window: int
    target_density: float
    corpus: tuple[Corpus, ...]
    tool_version: str
    sums: tuple[LayerSums, ...]

    # --- what it says --------------------------------------------------------------------------------

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.sums)

    def neurons(self, layer: int) -> int:
        """Number of neurons of a layer."""
        return len(self.sums[layer].gate_squares)

    def expert_neurons(self, layer: int) -> int:
        """Number of neurons of each expert of a layer; 0 where neurons inside experts were not counted."""
        inside = self.sums[layer].inside
        return 0 if inside is None else inside.active.shape[1]

    @cached_property
    def threshold_bins(self) -> tuple[int, ...]:
        """First active bin of each layer; empty where activations have exact zeros."""
        return tuple(
            threshold_bin(sums.histogram, self.target_density)
            for sums in self.sums
            if sums.histogram is not None
        )

    @cached_property
    def thresholds(self) -> NDArray[np.float32]:
        """The contribution from which a neuron is active, float32 [layers]; 0 with exact zeros."""
        if self.exact_zeros:
            return np.zeros(self.layers, np.float32)
        return np.array([lower_edge(index) for index in self.threshold_bins], np.float32)

    @cached_property
    def _counts(self) -> tuple[NDArray[np.uint64], ...]:
        return tuple(self._count(layer) for layer in range(self.layers))

    def _count(self, layer: int) -> NDArray[np.uint64]:
        sums = self.sums[layer]
        if sums.histogram is not None:
            return active_counts(sums.histogram, self.threshold_bins[layer])
        assert sums.counts is not None
        return sums.counts

    def counts(self, layer: int) -> NDArray[np.uint64]:
        """Tokens for which each neuron was active: uint64 [neurons]."""
        return self._counts[layer]

    def frequency(self, layer: int) -> NDArray[np.float64]:
        """Share of tokens for which each neuron was active: float64 [neurons]."""
        return self.counts(layer).astype(np.float64) / max(self.tokens, 1)

    def order(self, layer: int) -> NDArray[np.int32]:
        """Neurons by descending count, ties by index: int32 [neurons]."""
        counts = self.counts(layer)
        return np.argsort(counts.max(initial=0) - counts, kind="stable").astype(np.int32)

    def density(self, layer: int) -> float:
        """Mean share of the layer's neurons that is active for a token."""
        return float(self.frequency(layer).mean())

    def expert_density(self, layer: int) -> NDArray[np.float64] | None:
        """Mean share of each expert's neurons that is active for a token that takes it: float64 [experts],
        the layer's mean for an expert that no token took; None where that was not counted."""
        inside, mean = self.sums[layer].inside, self.density_inside(layer)
        if inside is None or mean is None:
            return None
        tokens = inside.tokens.astype(np.float64)
        shares = inside.active.sum(axis=1, dtype=np.uint64) / np.maximum(tokens, 1.0) / inside.active.shape[1]
        return np.where(tokens > 0, shares, mean)

    def density_inside(self, layer: int) -> float | None:
        """Mean share of an expert's neurons that is active for a token that takes it; None where that was not
        counted."""
        inside = self.sums[layer].inside
        if inside is None or not inside.tokens.any():
            return None
        every = int(inside.tokens.sum(dtype=np.uint64)) * int(inside.active.shape[1])
        return int(inside.active.sum(dtype=np.uint64)) / every

    def order_inside(self, layer: int) -> NDArray[np.int32] | None:
        """The neurons of each expert by descending count, ties by index: int32 [experts, neurons]; None where
        that was not counted."""
        inside = self.sums[layer].inside
        if inside is None:
            return None
        most = inside.active.max(axis=1, keepdims=True)
        return np.argsort(most - inside.active, axis=1, kind="stable").astype(np.int32)

    def gate_rms(self, layer: int) -> NDArray[np.float64]:
        """Root mean square of act(gate·x): float64 [neurons]."""
        return np.sqrt(self.sums[layer].gate_squares / max(self.tokens, 1))

    def up_rms(self, layer: int) -> NDArray[np.float64]:
        """Root mean square of up·x: float64 [neurons]."""
        return np.sqrt(self.sums[layer].up_squares / max(self.tokens, 1))

    @property
    def counting(self) -> str:
        """What was counted, and over how many tokens at once: plans from profiles with the same value for the
        same corpora agree."""
        what = f"neurons active at a density of {self.target_density:g}"
        if self.activation == ROUTING:
            what = "experts"
        elif self.exact_zeros:
            what = "neurons that are not exactly zero"
        return f"{what}, in windows of {self.window} tokens"

    # --- files ---------------------------------------------------------------------------------------

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, counts_alone: bool = False) -> Self:
        """Read and check ``path``; raises ``FormatError``, ``UnfinishedProfile`` for a checkpoint.
        ``counts_alone``: histograms are checked and let go, a layer at a time; such a profile has counts and
        their order, and is not saved."""
        from powerinfer_formats.profile_file import load_profile

        fields: dict[str, Any] = load_profile(Path(path), counts_alone=counts_alone)
        return cls(**fields)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``path`` atomically; raises ``FormatError`` for content that ``load`` would refuse."""
        from powerinfer_formats.profile_file import save_profile

        save_profile(self, Path(path), None)

    # --- merging -------------------------------------------------------------------------------------

    def with_target(self, target_density: float) -> Self:
        """The same sums judged by another target density: thresholds and counts follow."""
        return replace(self, target_density=target_density)

    @classmethod
    def merge(cls, profiles: Sequence[Self]) -> Self:
        """The profile of all corpora together; the order of ``profiles`` does not matter.

        All must be of the same model, window, activation and target density, and no corpus may be in two of
        them; else ``CannotMerge`` says what differs.
        """
        if not profiles:
            raise CannotMerge("profiles", "there is nothing to merge")
        first = profiles[0]
        for other in profiles[1:]:
            _check_same(first, other)
        _check_experts(profiles)
        corpus = sorted((entry for p in profiles for entry in p.corpus), key=document.corpus_key)
        for entry, following in pairwise(corpus):
            if (entry.name, entry.sha256) == (following.name, following.sha256):
                raise CannotMerge(entry.name, "is a corpus of two of the profiles; it would count twice")
        tokens = sum(profile.tokens for profile in profiles)
        if tokens > MAX_TOKENS:
            raise CannotMerge("profiles", f"{tokens} tokens are more than a profile can count ({MAX_TOKENS})")
        return replace(
            first,
            model_name=min(profile.model_name for profile in profiles),
            tokens=tokens,
            corpus=tuple(corpus),
            tool_version=", ".join(sorted({v for p in profiles for v in p.tool_version.split(", ")})),
            sums=tuple(add_sums([p.sums[layer] for p in profiles]) for layer in range(first.layers)),
        )


def _check_experts(profiles: Sequence[Profile]) -> None:
    """Of profiles with the same layers."""
    for layer in range(profiles[0].layers):
        sizes = {profile.expert_neurons(layer) for profile in profiles} - {0}
        if len(sizes) > 1:
            raise CannotMerge(
                "profiles", f"differ in the neurons of the experts of layer {layer}: {sorted(sizes)}"
            )


_MUST_AGREE = ("fingerprint", "architecture", "activation", "exact_zeros", "window", "target_density")


def _check_same(first: Profile, other: Profile) -> None:
    for name in _MUST_AGREE:
        ours, theirs = getattr(first, name), getattr(other, name)
        if ours != theirs:
            raise CannotMerge(
                "profiles",
                f"of {first.model_name!r} and {other.model_name!r} differ in {name}: {ours!r} and {theirs!r}",
            )
    shapes = [[profile.neurons(layer) for layer in range(profile.layers)] for profile in (first, other)]
    if shapes[0] != shapes[1]:
        raise CannotMerge(
            "profiles", f"of {first.model_name!r} and {other.model_name!r} differ in their neurons"
        )
