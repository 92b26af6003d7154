"""The predictors of a split file, put on a device."""

from collections.abc import Sequence
from functools import cached_property

import torch

from powerinfer_formats.split import SplitLayer
from powerinfer_formats.split_predictors import SplitLowRank, SplitPredictor, SplitSigns
from powerinfer_kernels import RowType
from powerinfer_tools.engine.hot.devices import Device
from powerinfer_tools.engine.hot.elementwise import BLOCK
from powerinfer_tools.engine.hot.hot_ffn import Inputs
from powerinfer_tools.engine.hot.loading import Form
from powerinfer_tools.engine.hot.prediction import HotLowRank, HotPredictor, HotSigns, Naming, Scorer
from powerinfer_tools.engine.hot.products import Product
from powerinfer_tools.model.device_memory import TOKENS_AT_ONCE
from powerinfer_tools.model.hyperparameter_types import Hyperparameters

Tensor = torch.Tensor


def reads_floats(predictor: SplitPredictor) -> bool:
    """Whether a predictor takes the FFN's input as it is, not as the integer kernels round it (where it reads
    the stream instead, either will do)."""
    return isinstance(predictor, SplitSigns) or predictor.residual or RowType(predictor.types[0]).is_float


def reads_stream(predictor: SplitPredictor | None) -> bool:
    """Whether a predictor reads the residual stream."""
    return isinstance(predictor, SplitLowRank) and predictor.residual


class PredictorParts:
    """The predictors of ``layers``, and the memory that they share; each piece is taken from the form's
    memory once. ``chunk``: flat space for unpacked rows."""

    def __init__(
        self,
        layers: Sequence[SplitLayer],
        hyper: Hyperparameters,
        tokens: int,
        form: Form,
        device: Device,
        chunk: Tensor,
        *,
        checks: bool = False,
    ) -> None:
        self._checks = checks
        self._layers, self._hyper, self._tokens = layers, hyper, tokens
        self._form, self._device, self._chunk = form, device, chunk
        self._memory = form.memory

    def predictor(self, layer: SplitLayer, hot: int) -> HotPredictor:
        """The predictor of ``layer``, which has ``hot`` neurons on the device."""
        predictor = layer.predictor
        assert predictor is not None
        counts = self._memory.typed(torch.int64, 3)
        if not self._memory.counting:
            counts.copy_(torch.zeros(3, dtype=torch.int64))
        scores = self._scores[:, : layer.neurons]
        threshold = self._form.vector(predictor.threshold)
        scorer, checks = self._scorer(predictor, layer), self._checks
        return HotPredictor(scorer, threshold, scores, self._stream, hot, counts, checks)

    def take_shared(self) -> None:
        """Take the memory that is taken once."""
        _ = self.naming, self._arriving

    @cached_property
    def naming(self) -> Naming:
        """Which neurons are named."""
        count = self._tokens * self._hyper.neurons if self._layers else 0
        host = self._device.staging(0 if self._memory.counting else -(-count // 4)).view(torch.uint8)
        return Naming(self._memory.take(count), host, self._form.window(self._device, host))

    def stream_ends(self, apart: Sequence[SplitLayer]) -> tuple[Tensor, Tensor]:
        """The host's and the device's end of the stream, where a predictor of the layers ``apart``, whose
        attention is the host's, reads it."""
        return self._device.staging(len(self._arriving), self._hyper.width), self._arriving

    @cached_property
    def _arriving(self) -> Tensor:
        reading = any(reads_stream(layer.predictor) for layer in self._layers)
        return self._memory.floats(self._tokens if reading else 0, self._hyper.width)

    @cached_property
    def _scores(self) -> Tensor:
        return self._memory.floats(self._few, self._hyper.neurons)

    @cached_property
    def _stream(self) -> Inputs:
        """A few rows of the stream, exact and rounded, where a predictor reads it."""
        reading = [layer.predictor for layer in self._layers if reads_stream(layer.predictor)]
        rounded = any(
            not RowType(predictor.types[0]).is_float for predictor in reading if predictor is not None
        )
        return self._inputs(self._few if reading else 0, self._hyper.width, rounded=rounded)

    @cached_property
    def _few(self) -> int:
        return min(TOKENS_AT_ONCE, self._tokens)

    @cached_property
    def _low(self) -> tuple[Tensor, Tensor]:
        """Flat space for short forms, exact and rounded."""
        ranks = [
            predictor.rank
            for predictor in (layer.predictor for layer in self._layers)
            if isinstance(predictor, SplitLowRank)
        ]
        count = self._few * max(ranks, default=0)
        return self._memory.floats(count), self._memory.floats(count)

    def _scorer(self, predictor: SplitPredictor, layer: SplitLayer) -> Scorer:
        if isinstance(predictor, SplitSigns):
            signs = self._memory.take(predictor.signs.size).view(predictor.signs.shape)
            if not self._memory.counting:
                signs.copy_(torch.from_numpy(predictor.signs.copy()))
            return HotSigns(signs)
        rank, (inward, outward) = predictor.rank, map(RowType, predictor.types)
        exact, rounded = (space[: self._few * rank].view(self._few, rank) for space in self._low)
        return HotLowRank(
            inward=Product(self._form.rows(predictor.inward, inward, layer.width), rank, layer.width),
            outward=Product(self._form.rows(predictor.outward, outward, rank), layer.neurons, rank),
            residual=predictor.residual,
            relu=predictor.relu,
            low=Inputs(exact, exact if outward.is_float else rounded),
            chunk=self._chunk,
        )

    def _inputs(self, rows: int, columns: int, *, rounded: bool) -> Inputs:
        exact = self._memory.floats(rows, columns)
        return Inputs(
            exact, self._memory.floats(rows, columns) if rounded and columns % BLOCK == 0 else exact
        )
