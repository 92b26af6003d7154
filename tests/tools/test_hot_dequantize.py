"""Unpacking in torch equals the C kernels' unpacking, bit for bit, for arbitrary block bytes."""

import numpy as np
import pytest
import torch

from powerinfer_kernels import RowType, block_shape, dequantize, repack, row_bytes
from powerinfer_tools.engine.hot.dequantize import dequantize as torch_dequantize


@pytest.mark.parametrize("row_type", list(RowType), ids=lambda row_type: row_type.name)
def test_equals_the_kernels(row_type: RowType) -> None:
    values, _ = block_shape(row_type)
    columns = values * 3 if values > 1 else 37
    rng = np.random.default_rng(int(row_type))
    rows = rng.integers(0, 256, (7, row_bytes(row_type, columns)), dtype=np.uint8)
    expected = dequantize(rows, row_type, 7, columns)
    packed = repack(rows, row_type, 7, columns)
    got = torch_dequantize(torch.from_numpy(packed), row_type, columns).numpy()
    # Random bytes make NaN scales too: compare those as a class, everything else by its bits.
    assert np.array_equal(np.isnan(expected), np.isnan(got))
    usable = ~np.isnan(expected)
    assert usable.any()
    assert np.array_equal(expected[usable].view(np.uint32), got[usable].view(np.uint32))
