"""The hot side: what a device other than the C kernels computes.

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
    """A piece of work: from when to when, in seconds of ``time.perf_counter``."""

    name: str
    start: float
    end: float


class HotSide(Protocol):
    """Computes what a plan places on a device, while the caller computes the rest.

    Of layers whose attention is the caller's, the first neurons of the FFN, or some experts: :meth:`launch`,
    :meth:`collect`. Layers whose attention is here leave the residual stream here: :meth:`enter`, then for
    each layer :meth:`begin`, :meth:`ffn_input` (where the caller computes cold neurons) and :meth:`merge`,
    then :meth:`leave`. Where all of a layer's neurons are the caller's, :meth:`leave` follows :meth:`begin`.

    Which experts tokens take is the caller's choice: where the attention of their layer is here, by what
    :meth:`router_scores` says after :meth:`begin`, with :meth:`experts` for those that are here and
    :meth:`ffn_input` for others. Sums of experts are made in the order of the routes.
    """

    @property
    def nbytes(self) -> int:
        """Device memory that was planned for and allocated, in bytes."""

    @property
    def weight_bytes(self) -> int:
        """The part of it that every token reads as weights, in bytes: without experts."""

    @property
    def stored_bytes(self) -> int:
        """The part of it that holds weights and KV cache, in bytes."""

    @property
    def peak_bytes(self) -> int | None:
        """The most device memory that was held; None where the device does not count it."""

    @property
    def seconds(self) -> float:
        """Time the device has worked, as far as it was measured."""

    def time(self, *, on: bool) -> None:
        """Whether :attr:`spans` and :attr:`seconds` cover what is queued from here on; a device
        for which that costs nothing tells them anyway."""

    @property
    def waiting_seconds(self) -> float:
        """Time the caller has waited for what is in :attr:`seconds`."""

    @property
    def notices(self) -> Sequence[str]:
        """What had to be done otherwise than asked, each once, in words for the user."""

    @property
    def spans(self) -> list[tuple[int | None, Span]]:
        """What the device did when, of everything that was waited for, with its layer (of many layers that
        are one piece of work, the first); the caller clears it."""

    @property
    def has_head(self) -> bool:
        """Whether the output norm and the head are here."""

    @property
    def identity(self) -> tuple[object, ...]:
        """What decides the bits of its sums, besides the model and the mode, as JSON values."""

    def cache_bytes(self, count: int) -> int:
        """Bytes of ``count`` positions of the KV caches that are here."""

    def cache_block(self, first: int, count: int) -> bytes:
        """What these hold of ``count`` positions from ``first`` on."""

    def restore_cache(self, first: int, count: int, data: bytes) -> None:
        """Put such a block back."""

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
        """Of the hot neurons of ``layer``, over all tokens: how many the predictor here did not name, and
        where that is counted, how many were active, and how many of those it named; None without one."""

    def launch(
        self,
        layer: int,
        normed: Floats,
        acts: Activations | None,
        x: Floats,
        routes: Sequence[Route] = (),
    ) -> None:
        """Begin ``layer`` for input rows ``normed`` (tokens, width), of which ``acts`` is the quantised
        copy, made from the rows ``x`` of the residual stream. None may change before :meth:`collect`, but
        ``x`` after :meth:`named`. ``routes``, where the layer has experts: all that go to those here, at
        least one."""

    def named(self, layer: int, out: Floats) -> None:
        """Wait until it is known which cold neurons of ``layer`` are named (after :meth:`ffn_input`, it is
        known), and write 1 for them and 0 for the others to ``out`` (tokens, cold neurons)."""

    def collect(self, out: Floats) -> None:
        """Wait for the launched layer and write its sum (tokens, width) to ``out``."""

    def enter(self, x: Floats, position: int) -> None:
        """The residual stream ``x`` (tokens, width) comes here; its first row stands at ``position``."""

    def begin(self, layer: int, tokens: int, position: int) -> None:
        """Begin ``layer``: attention, its FFN's input, its hot neurons."""

    def ffn_input(self, layer: int, normed: Floats, shown: Floats) -> None:
        """Wait for the normalised input of the begun ``layer``'s FFN, and write it to ``normed``
        (tokens, width); where a predictor of the caller reads the stream itself, that to ``shown``."""

    def router_scores(self, layer: int, experts: Floats, shared: Floats) -> None:
        """Wait for what the router of the begun ``layer`` says, and write it to ``experts``
        (tokens, experts), and to ``shared`` (tokens, 1) that of the expert that every token takes, before
        the sigmoid."""

    def experts(self, layer: int, routes: Sequence[Route], tokens: int) -> None:
        """Begin the experts of the begun ``layer`` that are here, for ``routes`` (at least one)."""

    def merge(self, layer: int, cold: Floats | None, tokens: int) -> None:
        """The sum of the begun layer's FFN joins the stream: that of the hot neurons, or experts, and
        ``cold`` (tokens, width), which may be changed at once; None where nothing was computed there."""

    def leave(self, x: Floats) -> None:
        """Wait for the residual stream and write it to ``x`` (tokens, width)."""

    def logits(self, x: Floats | None, first: int, last: int) -> Floats:
        """Logits (rows, vocabulary) of the rows ``first`` to ``last`` of the stream: ``x`` (rows, width), or
        the stream that stayed here where that is None. Valid until the next call."""

    def close(self) -> None:
        """Free the device memory."""


def open_hot_side(
    model: Model, device: str, vram: int | None, work: "Workload", progress: Progress | None = None
) -> tuple[HotSide | None, Sequence[str]]:
    """The hot side of ``model`` on ``device``, or None where nothing is to be computed there, and what must
    be said: where a GPU cannot be used, the C kernels compute everything.

    ``vram`` limits its bytes by moving the split point of layers; ``progress`` hears of kernels that have to
    be compiled. Raises HardwareError for an unknown device,
    a missing torch, a limit beyond what is free, or a model that has
    not been split.
    """
    if device not in DEVICES:
        raise HardwareError(f"device {device!r} is not one of {', '.join(DEVICES)}")
    if device == "none":
        return None, ()
    if not model.is_split:
        raise HardwareError(
            f"{model.path} is not a split file, so nothing can be placed on {device}; make one with "
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
