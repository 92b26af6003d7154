"""Whether the fused kernels work on the GPU that is there."""

import numpy as np
import torch

from powerinfer_kernels import RowType
from powerinfer_kernels.triton_layout import to_planar
from powerinfer_tools.engine.hot.faults import first_line


def fusing_problem() -> str | None:
    """Why the fused kernels cannot be used on the CUDA device, in words; None where they can."""
    try:
        from powerinfer_kernels.triton_launch import LEAST_CAPABILITY
    except Exception as error:  # noqa: BLE001 - versions too old or too new fail in ways of their own
        return f"Triton cannot be used ({first_line(error)})"
    major, minor = torch.cuda.get_device_capability(0)
    if (major, minor) < LEAST_CAPABILITY:
        return f"compute capability {major}.{minor} is below {'.'.join(map(str, LEAST_CAPABILITY))}"
    return tried(torch.device("cuda", 0))


def tried(where: torch.device) -> str | None:
    """The problem of a small product by a fused kernel on ``where``, if any. A missing compiler, header or
    part of the driver is noticed only when a kernel is built and launched."""
    from powerinfer_kernels import triton_launch

    columns, count = 32, 8
    rows = np.zeros((count, 2 + columns), np.uint8)
    rows[:, :2] = np.ones(1, np.float16).view(np.uint8)
    rows[:, 2:] = np.arange(count, dtype=np.uint8)[:, None]
    try:
        data = torch.from_numpy(to_planar(rows, RowType.Q8_0, columns)).to(where)
        planar = triton_launch.PlanarRows(data, RowType.Q8_0, count, columns)
        out = torch.empty(1, count, device=where)
        triton_launch.matvec(torch.ones(1, columns, device=where), planar, out)
        got = out[0].tolist()
    except Exception as error:  # noqa: BLE001 - compilers, loaders and drivers fail in ways of their own
        return (
            f"none could be built and launched ({first_line(error)}); Triton needs a C compiler and Python's "
            "header files"
        )
    return None if got == [float(columns * i) for i in range(count)] else "they compute wrong sums"
