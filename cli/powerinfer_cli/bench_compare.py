"""``powerinfer bench A B``: files and modes against each other, interleaved."""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import cast, get_args

import typer

from powerinfer_cli.console import emit_json, progress
from powerinfer_cli.engines import opened_engine
from powerinfer_cli.files import find_model
from powerinfer_cli.options import Mode, Placement
from powerinfer_cli.tables import print_table


def parse_contender(text: str) -> tuple[Path, Mode | None]:
    """``FILE`` or ``FILE@MODE``: the file, and the mode (None: that of the other options)."""
    name, at, mode = text.rpartition("@")
    if not at or Path(text).exists():
        return Path(text), None
    if mode not in get_args(Mode):
        raise typer.BadParameter(
            f"{text}: {mode!r} is not a mode; choose one of {', '.join(get_args(Mode))}", param_hint="FILE"
        )
    return Path(name), cast(Mode, mode)


def run(
    contenders: list[str],
    placement: Placement,
    *,
    prompt: int,
    generate: int,
    rounds: int,
    threads: int | None,
    as_json: bool,
) -> None:
    """Measure all ``contenders`` in turn and print each one's speed as a ratio to the first's."""
    from powerinfer_tools.measure.bench_comparison import compare

    chosen = [(text, *parse_contender(text)) for text in contenders]
    context = max(prompt, generate, 1)
    with ExitStack() as stack:
        engines = []
        for text, path, mode in chosen:
            placed = placement if mode is None else replace(placement, mode=mode)
            opened = opened_engine(find_model(path), placed, threads=threads, context=context)
            engines.append((text, stack.enter_context(opened)))
        rows = compare(engines, prompt=prompt, generate=generate, rounds=rounds, progress=progress())
    if as_json:
        emit_json([row.as_dict() for row in rows])
        return
    print_table(
        ("test", "tok/s", "ratio", "least – largest", "mode", "file"),
        [
            (
                row.test,
                f"{row.tokens_per_second:.2f}",
                f"{row.ratio:.2f}",
                f"{row.least_ratio:.2f} – {row.largest_ratio:.2f}",
                row.mode,
                row.name,
            )
            for row in rows
        ],
        title=f"each against {rows[0].name}, medians of {rounds} interleaved rounds" if rows else None,
    )
