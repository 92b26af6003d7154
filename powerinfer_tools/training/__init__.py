"""Making predictors from a trace."""

from powerinfer_tools.training.frontier import draw_frontier
from powerinfer_tools.training.options import TrainOptions, TrainReport
from powerinfer_tools.training.stage import require_trainable, run_train

__all__ = ["TrainOptions", "TrainReport", "draw_frontier", "require_trainable", "run_train"]
