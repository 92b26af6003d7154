"""Drafts for ``run``: what guesses, and the line on what came of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from powerinfer_cli import options as opt

_drafts = opt.in_panel("Drafts")


@dataclass(frozen=True)
class Drafts:
    """What guesses the next tokens, so that several are verified in one pass; the text stays the same."""

    draft: Annotated[
        str | None,
        _drafts(
            "--draft",
            metavar="ngram",
            help="Guess several tokens at once: those that followed the last few tokens earlier in "
            "the text. The text stays the same, bit for bit.",
        ),
    ] = None
    draft_model: Annotated[
        Path | None,
        _drafts(
            "--draft-model",
            metavar="FILE",
            help="Guess with a smaller model that has the same vocabulary. The text stays the same, "
            "bit for bit.",
        ),
    ] = None

    @property
    def given(self) -> bool:
        """Whether any are asked for."""
        return self.draft is not None or self.draft_model is not None


def check_drafts(drafts: Drafts, *, traced: bool) -> None:
    """Refuse what contradicts itself."""
    if drafts.draft not in (None, "ngram"):
        raise typer.BadParameter(
            f"{drafts.draft!r} is not a kind of draft; the only one is ngram", param_hint="--draft"
        )
    if drafts.draft is not None and drafts.draft_model is not None:
        raise typer.BadParameter("choose one of --draft and --draft-model", param_hint="--draft")
    if drafts.given and traced:
        raise typer.BadParameter(
            "a timeline shows one token at a time; leave out the drafts", param_hint="--trace"
        )


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
