"""A few tokens together have the bits of each alone, and rows that none of them selects are not read."""

import numpy as np
import numpy.typing as npt
import pytest

from powerinfer_kernels import (
    Activations,
    Bundle,
    Pool,
    ProgramBuilder,
    RowType,
    aligned,
    available_isas,
    block_shape,
)
from random_rows import U8, random_rows

F32 = npt.NDArray[np.float32]
NEURONS, MOST = 300, 8


class Case:
    """A ReLU block of which token t selects every 29th neuron from t on, and about half of those by name
    alone: their gates are not positive."""

    def __init__(self, row_type: RowType) -> None:
        rng = np.random.default_rng(int(row_type))
        self.row_type = row_type
        self.columns = 83 if row_type.is_float else {32: 288, 64: 320, 256: 256}[block_shape(row_type)[0]]
        self.rows = {k: random_rows(rng, row_type, NEURONS, self.columns) for k in ("gate", "up", "down")}
        self.x = rng.standard_normal((MOST, self.columns)).astype(np.float32)
        self.named = (np.arange(NEURONS) - np.arange(MOST)[:, None]) % 29 == 0
        size = np.abs(rng.standard_normal((MOST, NEURONS))).astype(np.float32) + np.float32(0.1)
        self.scores = np.where(self.named, size, -size)

    def poisoned(self, kinds: tuple[str, ...]) -> dict[str, U8]:
        """The rows of these kinds; those that nobody names are all ones: NaN in floats and scales."""
        rows = {kind: self.rows[kind].copy() for kind in kinds}
        for data in rows.values():
            data.reshape(NEURONS, -1)[~self.named.any(axis=0)] = 0xFF
        return rows


def run(case: Case, tokens: list[int], isa: str, threads: int, *, predicted: bool) -> tuple[F32, int]:
    """Output [tokens, columns] of these tokens in one run, and how many neurons were confirmed."""
    count = len(tokens)
    shapes = (NEURONS, case.columns, case.columns, NEURONS, NEURONS)
    select, x, out, h, gate = (aligned((count, width), np.float32) for width in shapes)
    select[:], x[:] = case.scores[tokens], case.x[tokens]
    acts = None if case.row_type.is_float else Activations(count, case.columns)
    builder = ProgramBuilder(count)
    if acts is not None:
        builder.quantize(x, acts)
    kinds = ("gate", "up", "down") if predicted else ("up", "down")
    with Pool(threads, isa) as pool:
        rows = {kind: (data, case.row_type) for kind, data in case.poisoned(kinds).items()}
        bundle = Bundle.pack(pool, NEURONS, case.columns, **rows)
        scratch = gate if predicted else None
        builder.sparse_ffn(select, x, acts, bundle, out, h, "relu", gate=scratch)
        program = builder.build()
        program.run(pool, 0, builder.mark(), count, 0)
    return np.array(out), program.confirmed_neurons()


@pytest.mark.parametrize("predicted", [False, True], ids=["gate-first", "predicted"])
@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("row_type", list(RowType), ids=lambda t: t.name)
def test_a_few_tokens_have_the_bits_of_one(row_type: RowType, isa: str, predicted: bool) -> None:
    case = Case(row_type)
    alone = [run(case, [token], isa, 1, predicted=predicted) for token in range(MOST)]
    expected = np.concatenate([out for out, _ in alone])
    assert np.isfinite(expected).all()
    assert (expected != 0).any()
    for count, threads in ((2, 1), (3, 2), (MOST, 3)):
        got, confirmed = run(case, list(range(count)), isa, threads, predicted=predicted)
        np.testing.assert_array_equal(got.view(np.uint32), expected[:count].view(np.uint32))
        assert confirmed == sum(number for _, number in alone[:count])
