"""Counting which neurons a model uses over a corpus."""

from powerinfer_tools.profiling.stage import ProfileOptions, run_profile

__all__ = ["ProfileOptions", "run_profile"]
