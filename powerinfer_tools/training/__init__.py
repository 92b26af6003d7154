"""Making predictors from a trace."""

from powerinfer_tools.training.stage import TrainOptions, TrainReport, run_train

__all__ = ["TrainOptions", "TrainReport", "run_train"]
