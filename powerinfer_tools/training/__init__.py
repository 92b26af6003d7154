"""Making predictors from a trace."""

from powerinfer_tools.training.options import TrainOptions, TrainReport
from powerinfer_tools.training.stage import run_train

__all__ = ["TrainOptions", "TrainReport", "run_train"]
