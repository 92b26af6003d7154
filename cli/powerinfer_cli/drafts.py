"""Drafts for ``run``: what guesses, opened and closed."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from powerinfer_cli import options as opt

if TYPE_CHECKING:
    from powerinfer_tools.engine import Engine
    from powerinfer_tools.model.loading import Model

_drafts = opt.in_panel("Drafts")


@dataclass(frozen=True)
class Drafts:
    """What guesses the next tokens, so that several are verified in one pass; the text stays the same."""

    draft: Annotated[
        str | None,
        _drafts(
            "--draft",
            metavar="ngram",
            help="Guess that what followed the last few tokens before follows them again; the text stays the "
            "same, bit for bit.",
        ),
    ] = None
    draft_model: Annotated[
        Path | None,
        _drafts(
            "--draft-model",
            metavar="FILE",
            help="Guess with a smaller model of the same vocabulary; the text stays the same, bit for bit.",
        ),
    ] = None

    @property
    def given(self) -> bool:
        """Whether any are asked for."""
        return self.draft is not None or self.draft_model is not None


def check_drafts(drafts: Drafts, *, traced: bool) -> None:
    """Refuse what contradicts itself."""
    if drafts.draft not in (None, "ngram"):
        raise typer.BadParameter(f"{drafts.draft!r} is not ngram, the only one", param_hint="--draft")
    if drafts.draft is not None and drafts.draft_model is not None:
        raise typer.BadParameter("choose one of --draft and --draft-model", param_hint="--draft")
    if drafts.given and traced:
        raise typer.BadParameter("a timeline is of one token; leave out the drafts", param_hint="--trace")


@contextmanager
def drafting(engine: "Engine", drafts: Drafts) -> Iterator[None]:
    """``engine`` verifies ``drafts``, where any are asked for. Raises ModelError."""
    from powerinfer_tools.engine.drafting import ModelDrafts, TextLookup

    if drafts.draft is not None:
        engine.draft_with(TextLookup())
    if drafts.draft_model is None:
        yield
        return
    from powerinfer_tools.engine import Weights
    from powerinfer_tools.model.loading import load_model

    small = load_model(drafts.draft_model)
    try:
        _require_same_vocabulary(engine.model, small)
        context = min(engine.context, small.hyper.trained_context)
        with Weights(small, threads=engine.threads, context=context) as weights:
            engine.draft_with(ModelDrafts(weights.session()))
            yield
    finally:
        small.close()


def draft_figures(engine: "Engine") -> dict[str, Any] | None:
    """What drafts did, as plain JSON values; None without any."""
    drafter = engine.drafter
    if drafter is None:
        return None
    counters = drafter.counters
    return {
        "drafted": counters.drafted,
        "accepted": counters.accepted,
        "accepted_share": counters.accepted / counters.drafted if counters.drafted else None,
        "passes": counters.passes,
        "tokens_per_pass": counters.tokens / counters.passes if counters.passes else None,
        "speed_up": drafter.speed_up,
    }


def drafts_line(figures: dict[str, Any]) -> str:
    """The same in one line."""
    if not figures["drafted"]:
        return "drafts: none seemed to pay"
    speed = figures["speed_up"]
    faster = "" if speed is None else f", {speed:.2f} × as fast as token by token"
    return (
        f"drafts: {figures['accepted_share']:.0%} of {figures['drafted']} tokens accepted, "
        f"{figures['tokens_per_pass']:.2f} tokens a pass{faster}"
    )


def _require_same_vocabulary(large: "Model", small: "Model") -> None:
    from powerinfer_tools.errors import ModelError

    keys = ("tokenizer.ggml.model", "tokenizer.ggml.tokens")
    same = large.hyper.vocabulary == small.hyper.vocabulary
    if same and all(large.gguf.metadata.get(key) == small.gguf.metadata.get(key) for key in keys):
        return
    raise ModelError(
        f"{small.path}: its vocabulary ({small.hyper.vocabulary} tokens) is not that of {large.path} "
        f"({large.hyper.vocabulary}), so it cannot draft for it; take a smaller model of the same family"
    )
