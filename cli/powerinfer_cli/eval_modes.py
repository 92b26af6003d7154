"""``powerinfer eval --compare``: the modes of one file, a row each."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import typer

from powerinfer_cli.console import emit_json, say
from powerinfer_cli.tables import print_table
from powerinfer_formats.modes import MODES

if TYPE_CHECKING:
    from powerinfer_tools.engine import Engine
    from powerinfer_tools.model.loading import Model
    from powerinfer_tools.progress import Progress
    from powerinfer_tools.quality.comparison import Comparison, Fidelity

EVERY_MODE = ",".join(MODES)


def modes_of(text: str) -> tuple[str, ...]:
    """The modes that ``--compare`` names, each once, in the order given; an unknown one is a usage error."""
    modes = tuple(dict.fromkeys(word.strip() for word in text.split(",")))
    for mode in modes:
        if mode not in MODES:
            raise typer.BadParameter(
                f"{mode!r} is not a mode; choose one of {', '.join(MODES)}", param_hint="--compare"
            )
    return modes


def measure_modes(
    open_engine: Callable[..., "Engine"],
    model: "Model",
    modes: tuple[str, ...],
    pieces: list[list[int]],
    listener: "Progress",
) -> "Comparison":
    """A row for each mode; see :func:`powerinfer_tools.quality.comparison.compare_modes`."""
    from powerinfer_tools.quality.comparison import compare_modes

    return compare_modes(open_engine, model, modes, pieces, listener)


def show_modes(compared: "Comparison", about: dict[str, Any], *, as_json: bool) -> None:
    """The table, then why figures are missing from it."""
    if as_json:
        emit_json(about | compared.as_dict())
        return
    headings = ("mode", "perplexity", "of dense", "KL, nats a token", "first choice", "density", "recall")
    print_table(headings, [_cells(row) for row in compared.rows])
    say(f"scored {compared.positions:,} tokens in {about['chunks']:,} windows of {about['context']}")
    for row in compared.rows:
        if not row.available:
            say(f"{row.mode}: not available: {row.note}")
        elif row.identical and row.mode != "dense":
            say(f"{row.mode}: every logit has the bits of dense")


def _cells(row: "Fidelity") -> tuple[str, ...]:
    recall = "–" if row.recall is None else f"{row.recall:.2%}"
    return (
        row.mode,
        _shown(row.perplexity, row.perplexity_error, ".4f"),
        _shown(row.perplexity_ratio, row.perplexity_ratio_error, ".4f"),
        _shown(row.kl, row.kl_error, ".2e"),
        _shown(row.top1_agreement, row.top1_error, ".2%"),
        _shown(row.density, None, ".1%"),
        recall,
    )


def _shown(value: float | None, error: float | None, form: str) -> str:
    """``value ± error``, or a dash where there is none."""
    if value is None:
        return "–"
    return f"{value:{form}} ± {error:{form}}" if error else f"{value:{form}}"
