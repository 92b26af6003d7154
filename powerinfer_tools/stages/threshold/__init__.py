"""threshold: which neurons of a SiLU or GELU model may be left out within a budget of perplexity."""

from powerinfer_tools.stages.threshold.thresholding import ThresholdOptions, ThresholdReport, run_threshold

__all__ = ["ThresholdOptions", "ThresholdReport", "run_threshold"]
