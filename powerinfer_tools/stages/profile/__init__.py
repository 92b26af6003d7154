"""Counting which neurons a model uses over a corpus."""

from powerinfer_tools.stages.profile.profiling import ProfileOptions, run_profile

__all__ = ["ProfileOptions", "run_profile"]
