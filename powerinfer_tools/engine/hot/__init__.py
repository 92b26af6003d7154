"""The hot side: the part of a model that a device computes instead of the C kernels.

This module imports no torch; :func:`open_hot_side` does, when a device is asked for.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from powerinfer_kernels import Activations
from powerinfer_tools.engine.hot.routes import Route
from powerinfer_tools.errors import HardwareError, how_to_install
from powerinfer_tools.model.loading import Model
from powerinfer_tools.progress import Progress

if TYPE_CHECKING:
    from powerinfer_tools.engine.hot.placement import Workload

Floats = npt.NDArray[np.float32]
DEVICES = ("none", "cpu", "cuda")


@dataclass(frozen=True)
class Span:
    """The start and end of a piece of work, in seconds of ``time.perf_counter``."""

    name: str
    start: float
    end: float


class HotSide(Protocol):
    """Computes the part of a model that a plan places on a device, while the caller computes the rest.

    If the caller computes a layer's attention, the device computes the first neurons of its FFN, or some of
    its experts: :meth:`launch`, :meth:`collect`. If the device computes the attention, the residual stream
    stays on the device: :meth:`enter`, then for each layer :meth:`begin`, :meth:`ffn_input` (if the caller
    computes cold neurons) and :meth:`merge`, then :meth:`leave`. If the caller computes all of a layer's
    neurons, :meth:`leave` follows :meth:`begin`.

    The caller chooses the experts that tokens take. If the attention of their layer is on the device, it
    chooses by the result of :meth:`router_scores` after :meth:`begin`, and then calls :meth:`experts` for the
    experts on the device and :meth:`ffn_input` for the others. Sums of experts are made in the order of the
    routes.
    """

    @property
    def nbytes(self) -> int:
        """Device memory that was planned and allocated, in bytes."""

    @property
    def weight_bytes(self) -> int:
        """The part of the device memory that every token reads as weights, in bytes: without experts."""

    @property
    def stored_bytes(self) -> int:
        """The part of the device memory that holds weights and KV cache, in bytes."""

    @property
    def peak_bytes(self) -> int | None:
        """The most device memory that was held; None where the device does not count it."""

    @property
    def seconds(self) -> float:
        """Time the device has worked, as far as it was measured."""

    def time(self, *, on: bool) -> None:
        """Set whether :attr:`spans` and :attr:`seconds` cover the work that is queued from here on; a device
        for which timing costs nothing always measures."""

    @property
    def waiting_seconds(self) -> float:
        """Time the caller has waited for the work in :attr:`seconds`."""

    @property
    def notices(self) -> Sequence[str]:
        """Deviations from the request, each once, in words for the user."""

    @property
    def spans(self) -> list[tuple[int | None, Span]]:
        """The spans of all work that was waited for, each with its layer (the first one if many layers are
        one piece of work); the caller clears the list."""

    @property
    def has_head(self) -> bool:
        """Whether the output norm and the head are here."""

    @property
    def identity(self) -> tuple[object, ...]:
        """The facts, besides the model and the mode, that determine the bits of the sums, as JSON values."""

    def cache_bytes(self, count: int) -> int:
        """Bytes of ``count`` positions of the KV caches that are here."""

    def cache_block(self, first: int, count: int) -> bytes:
        """The contents of the KV caches that are here, for ``count`` positions from ``first`` on."""

    def restore_cache(self, first: int, count: int, data: bytes) -> None:
        """Restore a block that :meth:`cache_block` returned."""

    def has_attention(self, layer: int) -> bool:
        """Whether the attention block of ``layer``, with its KV cache, is here."""

    def hot_neurons(self, layer: int) -> int:
        """How many neurons of ``layer`` are computed here."""

    def hot_experts(self, layer: int) -> frozenset[int]:
        """The experts of ``layer`` that are computed here, by number."""

    def has_predictor(self, layer: int) -> bool:
        """Whether the predictor of ``layer`` is here: it then names hot and cold neurons."""

    @property
    def left_out(self) -> int:
        """Hot neurons that predictors did not name so far, over all tokens."""

    def predicted(self, layer: int) -> tuple[int, int, int] | None:
        """Counts of the hot neurons of ``layer``, over all tokens: neurons that the predictor here did not
        name, and, if that is counted, active neurons and active neurons that it named. None without a
        predictor."""

    def launch(
        self,
        layer: int,
        normed: Floats,
        acts: Activations | None,
        x: Floats,
        routes: Sequence[Route] = (),
    ) -> None:
        """Begin ``layer`` for input rows ``normed`` (tokens, width), made from the rows ``x`` of the residual
        stream; ``acts`` is the quantised copy of ``normed``. None of these may change before :meth:`collect`,
        except ``x`` after :meth:`named`. ``routes``, if the layer has experts: all routes to experts on the
        device, at least one."""

    def named(self, layer: int, out: Floats) -> None:
        """Wait until the predictor has named the cold neurons of ``layer`` (after :meth:`ffn_input`, it has),
        and write 1 for the named neurons and 0 for the others to ``out`` (tokens, cold neurons)."""

    def collect(self, out: Floats) -> None:
        """Wait for the launched layer and write its sum (tokens, width) to ``out``."""

    def enter(self, x: Floats, position: int) -> None:
        """Send the residual stream ``x`` (tokens, width) to the device; its first row is at ``position``."""

    def begin(self, layer: int, tokens: int, position: int) -> None:
        """Begin ``layer``: attention, its FFN's input, its hot neurons."""

    def ffn_input(self, layer: int, normed: Floats, shown: Floats) -> None:
        """Wait for the normalised input of the begun ``layer``'s FFN, and write it to ``normed``
        (tokens, width). If a predictor of the caller reads the stream itself, write the stream to
        ``shown``."""

    def router_scores(self, layer: int, experts: Floats, shared: Floats) -> None:
        """Wait for the router's scores of the begun ``layer``, and write them to ``experts``
        (tokens, experts). Write the score of the shared expert, which every token takes, to ``shared``
        (tokens, 1), before the sigmoid."""

    def experts(self, layer: int, routes: Sequence[Route], tokens: int) -> None:
        """Begin the experts of the begun ``layer`` that are here, for ``routes`` (at least one)."""

    def merge(self, layer: int, cold: Floats | None, tokens: int) -> None:
        """Add the sum of the begun layer's FFN to the stream: the sum of the hot neurons, or experts, and
        ``cold`` (tokens, width), the caller's sum (None: the caller computed nothing). The caller may change
        ``cold`` at once."""

    def leave(self, x: Floats) -> None:
        """Wait for the residual stream and write it to ``x`` (tokens, width)."""

    def logits(self, x: Floats | None, first: int, last: int) -> Floats:
        """Logits (rows, vocabulary) of the rows ``first`` to ``last`` of the stream: ``x`` (rows, width), or,
        if ``x`` is None, the stream on the device. Valid until the next call."""

    def close(self) -> None:
        """Free the device memory."""


def open_hot_side(
    model: Model, device: str, vram: int | None, work: "Workload", progress: Progress | None = None
) -> tuple[HotSide | None, Sequence[str]]:
    """The hot side of ``model`` on ``device``, or None if nothing is to be computed there, and notices for
    the user. If a GPU cannot be used, the C kernels compute everything.

    ``vram`` limits its bytes by moving the split point of layers; ``progress`` is told about kernels that
    have to be compiled. Raises HardwareError for an unknown device, a missing torch, a limit beyond the free
    memory, or a model that has not been split.
    """
    if device not in DEVICES:
        raise HardwareError(f"device {device!r} is not one of {', '.join(DEVICES)}")
    if device == "none":
        return None, ()
    if not model.is_split:
        raise HardwareError(
            f"{model.path} is not a split file, so no part of it can be placed on {device}; make one with "
            "powerinfer plan and powerinfer convert, or use --device none"
        )
    if (limit := model.placement_limit) is not None:
        return None, [f"the hot side does not compute models with {limit}; everything is computed on the CPU"]
    try:
        from powerinfer_tools.engine.hot import opening
    except ImportError as error:
        raise HardwareError(
            f"--device {device} needs torch, which is not installed ({error}); "
            f"{how_to_install('torch')}, or use --device none"
        ) from None
    return opening.open_on(model, device, vram, work, progress)
