"""From the residual stream to logits: output norm and head, for up to HEAD_ROWS positions at a time."""

import numpy as np
import numpy.typing as npt

from powerinfer_kernels import Matrix, Pool, ProgramBuilder
from powerinfer_tools.engine.buffers import Scratch
from powerinfer_tools.engine.program_operations import ProgramOperations
from powerinfer_tools.engine.values import Value
from powerinfer_tools.model import blocks
from powerinfer_tools.model.counting import HEAD_ROWS
from powerinfer_tools.model.loading import Model

Floats = npt.NDArray[np.float32]


class Head:
    """The output norm and head of one model."""

    def __init__(self, model: Model, pool: Pool, matrix: Matrix) -> None:
        hyper = model.hyper
        self._pool, self._softcap, self._scale = pool, hyper.logit_softcap, hyper.logit_scale
        self._scratch, builder = Scratch(HEAD_ROWS), ProgramBuilder(HEAD_ROWS)
        self._input = self._scratch.named("head_input", hyper.width)
        ops = ProgramOperations(builder, self._scratch, pool, {}, ())
        logits = blocks.logits(ops, model, matrix, Value(self._input))
        self._length = ops.flush().mark()
        self._program, self._logits = builder.build(), logits.floats

    @property
    def nbytes(self) -> int:
        """Scratch memory, in bytes."""
        return self._scratch.nbytes

    @property
    def seconds(self) -> float:
        """Time spent here so far."""
        return float(np.sum(self._program.nanoseconds())) / 1e9

    def logits(self, x: Floats) -> Floats:
        """Logits (k, vocabulary) of residual rows ``x`` (k, width), k ≤ HEAD_ROWS. Valid until the next
        call."""
        rows = len(x)
        self._input[:rows] = x
        self._program.run(self._pool, 0, self._length, rows, 0)
        logits = self._logits[:rows]
        if self._scale != 1.0:
            logits *= np.float32(self._scale)
        if self._softcap:
            np.multiply(np.tanh(logits / np.float32(self._softcap)), np.float32(self._softcap), out=logits)
        return logits
