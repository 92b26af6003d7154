"""What has to hold before torch computes on CUDA: a GPU that works, and products in full precision."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from powerinfer_tools.engine.hot.faults import first_line


@contextmanager
def full_precision() -> Iterator[None]:
    """Products of float32 matrices in float32, whatever the calling program has set: TF32 rounds inputs to 10
    bits, an error of 5·10⁻⁴. Its setting is put back afterwards."""
    matmul: Any = torch.backends.cuda.matmul
    # torch 2.9 has a new name for it, and warns where both are used.
    name, value = ("fp32_precision", "ieee") if hasattr(matmul, "fp32_precision") else ("allow_tf32", False)
    before = getattr(matmul, name)
    setattr(matmul, name, value)
    try:
        yield
    finally:
        setattr(matmul, name, before)


def cuda_problem() -> str | None:
    """Why no CUDA device can be used, in words; None where one can. Tries a small piece of work on it."""
    with warnings.catch_warnings():
        # Torch's warnings here have the same content as the text below.
        warnings.simplefilter("ignore")
        available = torch.cuda.is_available()
    if not available:
        built = torch.version.cuda
        if built is None:
            return f"torch {torch.__version__} is a build without CUDA"
        return (
            f"torch {torch.__version__} finds no GPU that it can use: there is none, or its driver is older "
            f"than CUDA {built} needs"
        )
    try:
        probe = torch.ones(8, device="cuda")
        if float((probe + probe).sum()) != 16.0:
            return "the GPU computes wrong sums"
    except RuntimeError as error:
        return f"the GPU{_capability()} cannot be used: {first_line(error)}"
    return None


def _capability() -> str:
    """The compute capability in brackets, if a GPU that does not work still reports it."""
    try:
        major, minor = torch.cuda.get_device_capability(0)
    except RuntimeError:
        return ""
    return f" (compute capability {major}.{minor})"
