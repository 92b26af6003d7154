"""Turning a gated SiLU or GELU model into one with true zeros, by distillation on the user's own machine.

This module imports no torch; :func:`run_relufy` does.
"""

from powerinfer_tools.errors import HardwareError, how_to_install
from powerinfer_tools.progress import Progress
from powerinfer_tools.stages.relufy.application import DeltaReport, apply_delta
from powerinfer_tools.stages.relufy.drawing import draw_history
from powerinfer_tools.stages.relufy.options import TARGETS, Reading, RelufyOptions, RelufyReport

__all__ = [
    "TARGETS",
    "DeltaReport",
    "Reading",
    "RelufyOptions",
    "RelufyReport",
    "apply_delta",
    "draw_history",
    "run_relufy",
]


def run_relufy(options: RelufyOptions, progress: Progress | None = None) -> RelufyReport:
    """Make the ReLU model and write it to ``options.output``; see :mod:`.relufication`.

    Interrupted, the same call goes on from the last checkpoint. Raises CorpusError, HardwareError (also where
    torch is not installed), ModelError, ConvertError and FormatError.
    """
    try:
        from powerinfer_tools.stages.relufy.relufication import run
    except ImportError as error:
        raise HardwareError(
            f"relufy needs torch, which is not installed ({error}); {how_to_install('torch')}"
        ) from None
    return run(options, progress)
