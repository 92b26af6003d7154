"""``powerinfer eval --tasks``: multiple choice and other tasks through lm-eval."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from powerinfer_cli import options as opt
from powerinfer_cli.console import emit_json, say
from powerinfer_cli.tables import print_table

if TYPE_CHECKING:
    from powerinfer_tools.engine import Engine
    from powerinfer_tools.model.loading import Model
    from powerinfer_tools.progress import Progress

_tasks = opt.in_panel("Tasks")


@dataclass(frozen=True)
class Tasks:
    """Which tasks of lm-eval to run."""

    tasks: Annotated[
        str | None,
        _tasks("--tasks", metavar="NAMES", help="Tasks of lm-eval instead of a text, separated by commas."),
    ] = None
    tasks_dir: Annotated[
        Path | None,
        _tasks(
            "--tasks-dir",
            metavar="DIR",
            help="Take tasks from the YAML files in DIR, without network. These files may contain "
            "code, which is run.",
        ),
    ] = None
    limit: Annotated[
        int | None, _tasks("--limit", min=1, metavar="N", help="Ask only the first N questions of each task.")
    ] = None

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks, each once."""
        return tuple(dict.fromkeys(name.strip() for name in (self.tasks or "").split(",") if name.strip()))


def score_tasks(
    open_engine: Callable[..., "Engine"],
    model: "Model",
    modes: Sequence[str | None],
    tasks: Tasks,
    listener: "Progress",
) -> list[dict[str, Any]]:
    """A row for each mode, task and metric; a mode of None is what the file says."""
    from powerinfer_tools.quality.comparison import refusal
    from powerinfer_tools.quality.harness import run_tasks
    from powerinfer_tools.text import Tokenizer

    rows: list[dict[str, Any]] = []
    tokenizer = Tokenizer.from_gguf(model.source)
    for mode in modes:
        reason = refusal(model, mode) if mode else None
        if reason:
            say(f"{mode}: not available: {reason}")
            continue
        engine = open_engine(mode=mode)
        try:
            scores = run_tasks(
                engine, tokenizer, tasks.names, tasks.tasks_dir, limit=tasks.limit, progress=listener
            )
            rows += [{"mode": engine.report().mode, **vars(score)} for score in scores]
        finally:
            engine.close()
    return rows


def show_tasks(rows: list[dict[str, Any]], about: dict[str, Any], *, as_json: bool) -> None:
    """The table: a metric a row."""
    if as_json:
        emit_json(about | {"results": rows})
        return
    cells = [(row["task"], row["mode"], row["metric"], _shown(row), f"{row['samples']:,}") for row in rows]
    print_table(("task", "mode", "metric", "value", "questions"), cells)


def _shown(row: dict[str, Any]) -> str:
    error = row["standard_error"]
    return f"{row['value']:.4f}" if error is None else f"{row['value']:.4f} ± {error:.4f}"
