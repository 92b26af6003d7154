"""What a user's own texts take of a model, added to a profile: experts, or the neurons of a split file."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from powerinfer_formats.profile import ROUTING, Corpus, LayerSums, Profile, round_squares
from powerinfer_tools import __version__
from powerinfer_tools.engine.modes import layer_modes
from powerinfer_tools.engine.observation import LayerCounters
from powerinfer_tools.errors import ProfileError
from powerinfer_tools.model.loading import Model
from powerinfer_tools.stages.profile.profiling import DEFAULT_WINDOW
from powerinfer_tools.stages.profile.tally import Tally

Number = TypeVar("Number", bound=np.generic)


class Learning:
    """Counts which experts, or which neurons with a gate above zero, tokens take while something else runs
    ``model`` in ``mode``, for the profile in ``path``. ``beside``: a device computes a part of the neurons.

    Raises ProfileError where neither is counted, or for a profile of another model.
    """

    def __init__(self, model: Model, path: Path, mode: str | None = None, *, beside: bool = False) -> None:
        self._routed = model.hyper.routing is not None
        if not self._routed:
            _check_neurons(model, mode, beside=beside)
        self._model, self._path, self._tally = model, path, Tally(model, 1, inside=False)
        self._base = Profile.load(path) if path.exists() else None
        if self._base is not None and self._base.fingerprint != model.fingerprint:
            raise ProfileError(
                f"{path} is the profile of {self._base.model_name}, another model than {model.path}"
            )

    @property
    def observed(self) -> Sequence[LayerCounters | None]:
        """What every forward pass is to add to."""
        return self._tally.observed

    def _whole(self, tokens: int) -> bool:
        """Whether every layer counted all of ``tokens``."""
        layers = zip(self._tally.observed, self._model.hyper.facts, strict=True)
        if not self._routed:  # each token adds one to what stands for the up rows, which are not computed
            return all((seen.up_squares == tokens).all() for seen, _ in layers if seen)
        routing = self._model.hyper.routing
        assert routing is not None
        counts = [int(seen.counts.sum()) for seen, facts in layers if seen and facts.ffn == "experts"]
        return all(count == tokens * routing.used for count in counts)

    def save(self, tokens: int) -> Profile | None:
        """Add what ``tokens`` tokens took to the profile, which is written anew; None where there were none,
        or where a pass over the layers failed halfway, whose error says so.

        Raises FormatError where it cannot be written, or cannot count so many.
        """
        if not tokens or not self._whole(tokens):
            return None
        self._tally.close_window(0, tokens)
        sums, base = self._tally.sums(), self._base
        if not self._routed:
            sums = self._in_source_order(sums, tokens)
        counts = hashlib.sha256(b"".join(np.asarray(layer.counts).tobytes() for layer in sums)).hexdigest()
        now = datetime.now(UTC).isoformat(timespec="microseconds")
        learnt = Profile(
            fingerprint=self._model.fingerprint,
            model_name=self._model.name,
            architecture=self._model.spec.name,
            activation=ROUTING if self._routed else self._model.hyper.activation,
            exact_zeros=True,
            tokens=tokens,
            window=DEFAULT_WINDOW,
            target_density=0.2,
            corpus=(Corpus(f"use until {now}", counts, tokens, tokens),),
            tool_version=__version__,
            sums=sums,
        )
        if base is not None:
            learnt = replace(learnt, window=base.window, target_density=base.target_density)
            learnt = Profile.merge([base, learnt])
        learnt.save(self._path)
        return learnt

    def _in_source_order(self, sums: Sequence[LayerSums], tokens: int) -> tuple[LayerSums, ...]:
        """``sums`` of neurons in the split file's order. The squares of up rows are those that the profile
        has so far, for as many tokens."""
        split, ordered = self._model.split, list(sums)
        assert split is not None
        for layer in split.layers:
            here = sums[layer.index]
            assert here.counts is not None
            up = np.zeros(len(layer.order))
            if self._base is not None:
                squares = self._base.sums[layer.index].up_squares
                up = round_squares(squares * (tokens / max(1, self._base.tokens)))
            ordered[layer.index] = LayerSums(
                counts=_scattered(here.counts, layer.order),
                histogram=None,
                gate_squares=_scattered(here.gate_squares, layer.order),
                up_squares=up,
            )
        return tuple(ordered)


def _scattered(values: npt.NDArray[Number], order: npt.NDArray[np.integer]) -> npt.NDArray[Number]:
    placed = np.empty_like(values)
    placed[order] = values
    return placed


def _check_neurons(model: Model, mode: str | None, *, beside: bool) -> None:
    if model.split is None:
        raise ProfileError(
            f"{model.path}: --learn counts experts, and neurons of split files, and this is neither; "
            "powerinfer profile counts what it takes"
        )
    modes = [layer_modes(model, mode)[layer.index] for layer in model.split.layers]
    other = next((name for name in modes if name != "gate-first"), None)
    if other is not None or beside:
        what = f"a layer is {other}" if other is not None else "--device computes a part of them"
        raise ProfileError(
            f"{model.path}: --learn counts neurons by their gates, which mode gate-first computes for all of "
            f"them, and {what}; add --mode gate-first, without --device"
        )
