"""What a user's own texts take of a mixture of experts, added to a profile."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from powerinfer_formats.profile import ROUTING, Corpus, Profile
from powerinfer_tools import __version__
from powerinfer_tools.engine.observation import LayerCounters
from powerinfer_tools.errors import ProfileError
from powerinfer_tools.model.loading import Model
from powerinfer_tools.stages.profile.profiling import DEFAULT_WINDOW
from powerinfer_tools.stages.profile.tally import Tally


class Learning:
    """Counts which experts of ``model`` are taken while something else runs it, for the profile in ``path``.
    Raises ProfileError for a model without experts, or a profile of another model."""

    def __init__(self, model: Model, path: Path) -> None:
        if model.hyper.routing is None:
            raise ProfileError(f"{model.path}: --learn counts experts, and this model has none")
        self._model, self._path, self._tally = model, path, Tally(model, 1)
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
        routing = self._model.hyper.routing
        assert routing is not None
        layers = zip(self._tally.observed, self._model.hyper.facts, strict=True)
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
        counts = hashlib.sha256(b"".join(np.asarray(layer.counts).tobytes() for layer in sums)).hexdigest()
        now = datetime.now(UTC).isoformat(timespec="microseconds")
        learnt = Profile(
            fingerprint=self._model.fingerprint,
            model_name=self._model.name,
            architecture=self._model.spec.name,
            activation=ROUTING,
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
