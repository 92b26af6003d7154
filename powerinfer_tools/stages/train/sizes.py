"""How large each layer's predictor is to be."""

import numpy as np

from powerinfer_formats.predictors import SignBits
from powerinfer_kernels import RowType, block_shape, pack_signs
from powerinfer_tools.stages.train.choice import Candidate
from powerinfer_tools.stages.train.layer_data import LayerData
from powerinfer_tools.stages.train.low_rank import cut, factorize
from powerinfer_tools.stages.train.naming import Floats, fit, level_for, quality

#: Records that a rank is tried on: enough for three digits of its density.
_TRIED_RECORDS = 1024


def ranks(width: int, row_type: RowType) -> list[int]:
    """Ranks to try: whole blocks, up to half of the width: beyond, a predictor costs more than the gate
    saves."""
    block = max(block_shape(row_type)[0], 16)
    steps = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
    return [block * step for step in steps if block * step <= max(block, width // 2)]


def nbytes(rank: int, width: int, neurons: int, row_type: RowType) -> int:
    """Bytes of a low-rank predictor in a split file."""
    values, size = block_shape(row_type)
    return (rank * (width // values) + neurons * (rank // values)) * size + 4 * neurons


def sign_bytes(width: int, neurons: int) -> int:
    """Bytes of a sign predictor in a split file."""
    return neurons * (-(-width // 8) + 4)


def candidates(data: LayerData, row_type: RowType, recall: float) -> list[Candidate]:
    """What a layer's low-rank predictor can be, priced by its bytes: a token touches them, and the rows of
    the neurons that it names at this recall. ``what`` is the rank.

    All rows of the named neurons count, though of those that turn out to be inactive only the gate's are
    read: without that, smaller predictors win, which miss what matters more at the same recall (docs/LOG.md,
    2026-11-26).
    """
    neurons, width = data.gate.shape
    learn, some = data.learn.inputs, data.check.first(_TRIED_RECORDS)
    true, factors = data.gates(learn), factorize(data.gate, learn)
    sizes = []
    for rank in ranks(width, row_type):
        normal = fit(cut(factors, rank, row_type), learn, true).normal(some.inputs)
        reached = quality(normal > level_for(normal, some.active, recall), some.active)
        size = nbytes(rank, width, neurons, row_type)
        rows = data.gate_bytes + data.other_bytes
        sizes.append(Candidate(size, size + reached.predicted_density * rows, rank))
    return sizes


def sign_candidates(data: LayerData) -> list[Candidate]:
    """The one predictor of signs that a layer can have, of rank 0: there is nothing to choose."""
    neurons, width = data.gate.shape
    size = sign_bytes(width, neurons)
    return [Candidate(size, size, 0)]


def sign_bits(gate: Floats) -> SignBits:
    """The signs of ``gate`` (neurons, width), with thresholds of zero."""
    return SignBits(pack_signs(gate), np.zeros(len(gate), np.float32))
