"""The ``powerinfer`` command: arguments in, stages of :mod:`powerinfer_tools` called, results out."""
