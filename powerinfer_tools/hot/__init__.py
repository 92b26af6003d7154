"""The hot side: the neurons that a device other than the C kernels computes.

This module imports no torch; :func:`open_hot_side` does, when a device is asked for.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from powerinfer_kernels import Activations
from powerinfer_tools.errors import HardwareError
from powerinfer_tools.model import Model

Floats = npt.NDArray[np.float32]
DEVICES = ("none", "cpu", "cuda")


@dataclass(frozen=True)
class Span:
    """A piece of work: from when to when, in seconds of ``time.perf_counter``."""

    name: str
    start: float
    end: float


class HotSide(Protocol):
    """Computes the first neurons of each layer's FFN, while the caller computes the others."""

    @property
    def nbytes(self) -> int:
        """Device memory that was planned for and allocated, in bytes."""

    @property
    def peak_bytes(self) -> int | None:
        """The most device memory that was held; None where the device does not count it."""

    @property
    def seconds(self) -> float:
        """Time the device has worked."""

    @property
    def waiting_seconds(self) -> float:
        """Time the caller has waited in :meth:`collect`."""

    @property
    def notices(self) -> Sequence[str]:
        """What had to be done otherwise than asked, each once, in words for the user."""

    def hot_neurons(self, layer: int) -> int:
        """How many neurons of ``layer`` are computed here."""

    def launch(self, layer: int, normed: Floats, acts: Activations | None) -> None:
        """Begin ``layer`` for input rows ``normed`` (tokens, width), of which ``acts`` is the quantised
        copy. Neither may change before :meth:`collect`."""

    def collect(self, out: Floats) -> list[Span]:
        """Wait for the launched layer and write its sum (tokens, width) to ``out``; what the device did
        when."""

    def close(self) -> None:
        """Free the device memory."""


def open_hot_side(
    model: Model, device: str, vram: int | None, tokens: int
) -> tuple[HotSide | None, Sequence[str]]:
    """The hot side of ``model`` on ``device``, or None where nothing is to be computed there, and what must
    be said: where a GPU cannot be used, the C kernels compute everything.

    ``vram`` limits its bytes by moving the split point of layers; ``tokens`` is the largest batch. Raises
    HardwareError for an unknown device, a missing torch, a limit beyond what is free, or a model that has not
    been split.
    """
    if device not in DEVICES:
        raise HardwareError(f"device {device!r} is not one of {', '.join(DEVICES)}")
    if device == "none":
        return None, ()
    if model.hyper.routing is not None:
        raise HardwareError(f"{model.path}: experts are not placed on {device} yet; use --device none")
    if model.split is None:
        raise HardwareError(
            f"{model.path} is not a split file, so nothing can be placed on {device}; make one with "
            "powerinfer plan and powerinfer convert, or use --device none"
        )
    try:
        from powerinfer_tools.hot import opening
    except ImportError as error:
        raise HardwareError(
            f"--device {device} needs torch, which is not installed ({error}); "
            "pip install 'powerinfer[torch]', or use --device none"
        ) from None
    return opening.open_on(model, device, vram, tokens)
