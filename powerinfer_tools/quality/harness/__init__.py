"""Multiple-choice and other tasks through EleutherAI's ``lm-eval`` (extra ``lm-eval``).

This module imports it only when tasks are run.
"""

from powerinfer_tools.quality.harness.tasks import TaskScore, run_tasks

__all__ = ["TaskScore", "run_tasks"]
