"""Drafts: guesses of the next tokens of a model's sessions, so that one pass verifies several tokens."""

from pathlib import Path
from typing import Literal

from powerinfer_tools.engine import Engine, Weights
from powerinfer_tools.engine.drafting import ModelDrafts, TextLookup
from powerinfer_tools.errors import ModelError
from powerinfer_tools.model.loading import Model, load_model

Draft = Literal["ngram"]


class Drafts:
    """Drafts for sessions of ``large``: from the text so far ("ngram"), or by the smaller model at ``path``.

    Raises ModelError if the vocabularies differ or memory does not suffice, FormatError for a file that
    cannot be read, ValueError if both are given.
    """

    def __init__(self, large: Model, weights: Weights, draft: Draft | None, path: Path | None) -> None:
        if draft not in (None, "ngram"):
            raise ValueError(f"draft is {draft!r}, expected 'ngram'")
        if draft is not None and path is not None:
            raise ValueError("drafts come from draft or from draft_model, not from both")
        self._draft, self._small, self._weights = draft, None, None
        if path is not None:
            self._small = load_model(path)
            try:
                _require_same_vocabulary(large, self._small)
                context = min(weights.context, self._small.hyper.trained_context)
                self._weights = Weights(self._small, threads=weights.pool.threads, context=context)
            except BaseException:
                self._small.close()
                raise

    def attach(self, engine: Engine) -> None:
        """``engine``, whose session is empty, verifies drafts from now on. Raises ModelError if results may
        depend on the size of a batch."""
        if self._draft is not None:
            engine.draft_with(TextLookup())
        elif self._weights is not None:
            engine.draft_with(ModelDrafts(self._weights.session()))

    def close(self) -> None:
        """Close the smaller model."""
        if self._small is not None and self._weights is not None:
            self._weights.close()
            self._small.close()


def _require_same_vocabulary(large: Model, small: Model) -> None:
    keys = ("tokenizer.ggml.model", "tokenizer.ggml.tokens")
    same = large.hyper.vocabulary == small.hyper.vocabulary
    if same and all(large.source.metadata.get(key) == small.source.metadata.get(key) for key in keys):
        return
    raise ModelError(
        f"{small.path}: its vocabulary ({small.hyper.vocabulary} tokens) is not that of {large.path} "
        f"({large.hyper.vocabulary}), so it cannot draft for it; take a smaller model of the same family"
    )
