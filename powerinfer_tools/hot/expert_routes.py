"""What a hot side of experts does for its caller, who routes. This module imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from powerinfer_kernels import Activations
from powerinfer_tools.errors import HardwareError
from powerinfer_tools.hot import DEVICES, Span
from powerinfer_tools.model import Model

Floats = npt.NDArray[np.float32]
#: The number that the expert has which every token takes.
SHARED = -1


@dataclass(frozen=True)
class Route:
    """The tokens (rows of a batch, ascending) that take one expert, and its weight in each."""

    expert: int
    tokens: Sequence[int]
    weights: Sequence[float]


class HotExpertSide(Protocol):
    """Computes the hot experts of each layer, while the caller computes the others."""

    @property
    def nbytes(self) -> int:
        """Device memory that was planned for and allocated, in bytes."""

    @property
    def weight_bytes(self) -> int:
        """The part of it that holds experts, in bytes."""

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

    def hot_experts(self, layer: int) -> frozenset[int]:
        """The experts of ``layer`` that are computed here, :data:`SHARED` among them or not."""

    def launch(self, layer: int, normed: Floats, acts: Activations | None, routes: Sequence[Route]) -> None:
        """Begin ``layer`` for input rows ``normed`` (tokens, width), of which ``acts`` is the quantised copy,
        and for ``routes``, at least one. Nothing of it may change before :meth:`collect`."""

    def collect(self, out: Floats) -> list[Span]:
        """Wait for the launched layer and write its sum (tokens, width) to ``out``: expert by expert in the
        order of the routes; what the device did when."""

    def close(self) -> None:
        """Free the device memory."""


def open_hot_experts(
    model: Model, device: str, vram: int | None, tokens: int
) -> tuple[HotExpertSide | None, Sequence[str]]:
    """The hot side of a mixture of experts on ``device``, or None where nothing is to be computed there, and
    what must be said; see :func:`powerinfer_tools.hot.open_hot_side`, whose errors this has."""
    if device not in DEVICES:
        raise HardwareError(f"device {device!r} is not one of {', '.join(DEVICES)}")
    if device == "none":
        return None, ()
    if model.split_experts is None:
        raise HardwareError(
            f"{model.path} is not a split file, so nothing can be placed on {device}; make one with "
            "powerinfer plan and powerinfer convert, or use --device none"
        )
    try:
        from powerinfer_tools.hot import expert_opening
    except ImportError as error:
        raise HardwareError(
            f"--device {device} needs torch, which is not installed ({error}); "
            "pip install 'powerinfer[torch]', or use --device none"
        ) from None
    return expert_opening.open_on(model, device, vram, tokens)
