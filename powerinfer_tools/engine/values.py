"""Values of the vocabulary in a program of the C kernels."""

from dataclasses import dataclass

from powerinfer_tools.engine.buffers import Floats


@dataclass(frozen=True, eq=False)
class Value:
    """A buffer (tokens, width) of the program."""

    floats: Floats
