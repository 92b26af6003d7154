"""From the residual stream to logits: output norm and head, for up to :data:`HEAD_ROWS` positions at a
time."""

import numpy as np
import numpy.typing as npt

from powerinfer_kernels import Matrix, Pool, ProgramBuilder, aligned
from powerinfer_tools.engine.blocks import append_norm
from powerinfer_tools.engine.buffers import activations
from powerinfer_tools.model.loading import Model

Floats = npt.NDArray[np.float32]
#: Positions scored per call of the head; 32 rows of a 150,000-token vocabulary are 19 MB.
HEAD_ROWS = 32


class Head:
    """The output norm and head of one model."""

    def __init__(self, model: Model, pool: Pool, matrix: Matrix) -> None:
        hyper = model.hyper
        self._pool, self._matrix, self._softcap = pool, matrix, hyper.logit_softcap
        self._input = aligned((HEAD_ROWS, hyper.width), np.float32)
        self._logits = aligned((HEAD_ROWS, hyper.vocabulary), np.float32)
        acts = activations(HEAD_ROWS, hyper.width)
        builder = ProgramBuilder(HEAD_ROWS)
        append_norm(builder, self._input, model.output_norm, self._input, hyper.norm_eps)
        if not matrix.row_type.is_float and acts is not None:
            builder.quantize(self._input, acts)
        builder.matmul(matrix, self._input, acts, self._logits)
        self._length = builder.mark()
        self._program = builder.build()

    @property
    def nbytes(self) -> int:
        """Scratch memory, in bytes."""
        return self._input.nbytes + self._logits.nbytes

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
        if self._softcap:
            np.multiply(np.tanh(logits / np.float32(self._softcap)), np.float32(self._softcap), out=logits)
        return logits
