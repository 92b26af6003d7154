"""Runs tasks of ``lm-eval`` on an engine and gathers their scores."""

import contextlib
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from powerinfer_tools.engine import Engine
from powerinfer_tools.errors import EvaluationError, how_to_install
from powerinfer_tools.progress import Progress, Silent
from powerinfer_tools.text import Tokenizer

#: Resamplings for the standard errors of metrics that are not means.
_BOOTSTRAPS = 1000


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task: accuracy (``acc``), accuracy by log-likelihood per byte (``acc_norm``), …
    ``standard_error`` is None where lm-eval gives none; ``samples`` are the questions asked."""

    task: str
    metric: str
    value: float
    standard_error: float | None
    samples: int


def run_tasks(
    engine: Engine,
    tokenizer: Tokenizer,
    names: Sequence[str],
    folder: Path | None,
    *,
    limit: int | None = None,
    progress: Progress | None = None,
) -> tuple[TaskScore, ...]:
    """Scores of the tasks ``names``. With a ``folder``, its task files (YAML) define the tasks, and nothing
    is fetched; without one, they are lm-eval's own, which fetch their data. ``limit``: only the first
    questions.

    Task files may contain code, which lm-eval runs. Raises EvaluationError if lm-eval is not installed, knows
    no such task, or cannot run it.
    """
    if folder is not None:
        if not folder.is_dir():
            raise EvaluationError(f"{folder}: no such folder of task files")
        # Read when these packages are imported: they would ask the network about local files, too.
        os.environ.update({"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"})
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        from powerinfer_tools.quality.harness.adapter import PowerInferLM
    except ImportError as error:
        raise EvaluationError(
            f"tasks need lm-eval, which is not installed ({error}); {how_to_install('lm_eval>=0.4.9,<0.5')}"
        ) from None
    with _off_standard_output():
        manager = TaskManager(include_path=str(folder) if folder else None, include_defaults=folder is None)
        _check_names(names, manager.all_tasks, folder)
        try:
            results = simple_evaluate(
                model=PowerInferLM(engine, tokenizer, progress or Silent()),
                tasks=list(names),
                task_manager=manager,
                limit=limit,
                bootstrap_iters=_BOOTSTRAPS,
                log_samples=False,
                verbosity="ERROR",
            )
        except (ValueError, KeyError, OSError, TypeError) as error:
            raise EvaluationError(f"lm-eval cannot run {', '.join(names)}: {error}") from error
    return tuple(_scores(results))


def _check_names(names: Sequence[str], tasks: Sequence[str], folder: Path | None) -> None:
    for name in names:
        if name not in tasks:
            where = (
                f"{folder} defines {', '.join(tasks) or 'none'}" if folder else "lm-eval ls tasks lists them"
            )
            raise EvaluationError(f"there is no task {name!r}; {where}")


def _scores(results: Mapping[str, Any]) -> Iterator[TaskScore]:
    """Metrics are named like "acc,none" (metric and filter), beside "acc_stderr,none"."""
    for task, values in results["results"].items():
        samples = int(results["n-samples"][task]["effective"]) if task in results["n-samples"] else 0
        for key, value in values.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr") or not isinstance(value, float | int):
                continue
            error = values.get(f"{metric}_stderr,{filtered}")
            is_finite = isinstance(error, float | int) and math.isfinite(error)
            name = metric if filtered == "none" else f"{metric} ({filtered})"
            yield TaskScore(task, name, float(value), float(error) if is_finite else None, samples)


@contextlib.contextmanager
def _off_standard_output() -> Iterator[None]:
    """Send lm-eval's output to standard error: standard output is for the result."""
    with contextlib.redirect_stdout(sys.stderr):
        yield
