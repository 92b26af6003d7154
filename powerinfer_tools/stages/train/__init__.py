"""Making predictors from a trace."""

from powerinfer_tools.stages.train.frontier import draw_frontier
from powerinfer_tools.stages.train.options import TrainOptions, TrainReport
from powerinfer_tools.stages.train.training import require_trainable, run_train

__all__ = ["TrainOptions", "TrainReport", "draw_frontier", "require_trainable", "run_train"]
