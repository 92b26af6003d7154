"""The hot side in torch: quantised rows stay quantised on the device and are unpacked chunk by chunk.

Correct on every device torch has; on CUDA not tuned yet: unpacking goes through plain torch operations, not a
fused kernel, so it moves more bytes than the rows themselves. On torch's CPU device, which stands in for a
GPU, there is no small memory to save: rows are unpacked once where that takes at most :data:`UNPACKED_LIMIT`.
"""

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from powerinfer_formats.split import SplitLayer
from powerinfer_kernels import Activations, RowType
from powerinfer_tools.errors import HardwareError
from powerinfer_tools.hot.dequantize import dequantize
from powerinfer_tools.hot.placement import CHUNK_ROWS, fit, hot_size
from powerinfer_tools.model import Model

Floats = npt.NDArray[np.float32]
#: Bytes of float32 rows that the CPU device may hold.
UNPACKED_LIMIT = 2 << 30


@dataclass(frozen=True)
class _Rows:
    """Rows of one matrix on the device: uint8 (neurons, row_bytes), or unpacked float32 (neurons, width)."""

    row_type: RowType
    data: torch.Tensor

    def chunk(self, first: int, last: int, columns: int) -> torch.Tensor:
        """float32 (last - first, columns)."""
        piece = self.data[first:last]
        return piece if piece.dtype == torch.float32 else dequantize(piece, self.row_type, columns)


@dataclass(frozen=True)
class _HotLayer:
    """``gate``: the rows that the activation reads; without gate those of up, and ``up`` is None. ``bias``
    is added to their products."""

    gate: _Rows
    up: _Rows | None
    down: _Rows
    bias: torch.Tensor | None
    neurons: int
    width: int


class TorchHotSide:
    """Hot neurons of all layers on one torch device."""

    def __init__(
        self, device: str, layers: Sequence[_HotLayer | None], activation: tuple[str, float], nbytes: int
    ) -> None:
        self._device, self._layers, self._activation = torch.device(device), layers, activation
        self._nbytes, self.seconds, self.waiting_seconds = nbytes, 0.0, 0.0
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="powerinfer-hot")
        self._running: Future[torch.Tensor] | None = None

    @classmethod
    def open(cls, model: Model, device: str, vram: int | None, tokens: int) -> "TorchHotSide":
        """Copy the hot rows of a split model to ``device``, after checking that everything will fit."""
        split = model.split
        assert split is not None
        if device == "cuda":
            _require_cuda()
        layers = [split.layer(i) for i in range(model.hyper.layers)]
        hot = fit(layers, vram, split.group, tokens)
        size = hot_size(layers, hot, tokens).total
        if device == "cuda":
            _require_free(size)
        values = len(layers[0].kinds) * model.hyper.width * sum(hot)
        unpack = device == "cpu" and 4 * values <= UNPACKED_LIMIT
        rows = [
            _load(layer, count, device, unpack=unpack) if count else None
            for layer, count in zip(layers, hot, strict=True)
        ]
        return cls(device, rows, (model.hyper.activation, model.hyper.activation_cut), size)

    @property
    def nbytes(self) -> int:
        """Device memory for weights and scratch, in bytes."""
        return self._nbytes

    def hot_neurons(self, layer: int) -> int:
        """Neurons of ``layer`` that are computed here."""
        hot = self._layers[layer]
        return hot.neurons if hot else 0

    def launch(self, layer: int, normed: Floats, acts: Activations | None) -> None:
        """Begin ``layer`` in the worker; see :class:`powerinfer_tools.hot.HotSide`."""
        hot = self._layers[layer]
        assert hot is not None
        assert self._running is None
        self._running = self._worker.submit(self._compute, hot, normed, acts)

    def collect(self, out: Floats) -> None:
        """Wait for the launched layer and copy its sum to ``out``."""
        assert self._running is not None
        started = time.perf_counter()
        result = self._running.result()
        self._running = None
        torch.from_numpy(out).copy_(result)
        self.waiting_seconds += time.perf_counter() - started

    def close(self) -> None:
        """Free the device memory and end the worker."""
        self._worker.shutdown()
        self._layers = [None] * len(self._layers)

    @torch.inference_mode()
    def _compute(self, hot: _HotLayer, normed: Floats, acts: Activations | None) -> torch.Tensor:
        started = time.perf_counter()
        exact = torch.from_numpy(normed).to(self._device)
        rounded = exact if acts is None else _rounded(acts, len(normed)).to(self._device)
        out = torch.zeros((len(normed), hot.width), dtype=torch.float32, device=self._device)
        for_gate = exact if hot.gate.row_type.is_float else rounded
        for_up = exact if hot.up is None or hot.up.row_type.is_float else rounded
        for first in range(0, hot.neurons, CHUNK_ROWS):
            last = min(first + CHUNK_ROWS, hot.neurons)
            gate = for_gate @ hot.gate.chunk(first, last, hot.width).T
            if hot.bias is not None:
                gate += hot.bias[first:last]
            up = None if hot.up is None else for_up @ hot.up.chunk(first, last, hot.width).T
            hidden = _activate(gate, up, *self._activation)
            out.addmm_(hidden, hot.down.chunk(first, last, hot.width))
        result = out.cpu()
        self.seconds += time.perf_counter() - started
        return result


def _rounded(acts: Activations, tokens: int) -> torch.Tensor:
    """The values that the integer kernels compute with: q·d per block, float32 (tokens, width)."""
    scales = torch.from_numpy(acts.d[:tokens])
    quants = torch.from_numpy(acts.q[:tokens]).reshape(tokens, scales.shape[1], -1)
    return (quants * scales[:, :, None]).reshape(tokens, -1)


def _activate(gate: torch.Tensor, up: torch.Tensor | None, kind: str, cut: float) -> torch.Tensor:
    """act(gate)·up, or act(gate); ``cut`` is that of fatrelu."""
    functional = torch.nn.functional
    match kind:
        case "silu":
            act = functional.silu(gate)
        case "gelu_tanh":
            act = functional.gelu(gate, approximate="tanh")
        case "gelu_erf":
            act = functional.gelu(gate)
        case "relu" | "drelu":
            act = functional.relu(gate)
        case "relu2":
            act = functional.relu(gate).square()
        case "fatrelu":
            act = functional.threshold(gate, cut, 0.0)
        case _:
            raise AssertionError(f"activation {kind!r} has no torch form")
    if up is None:
        return act
    return act * (functional.relu(up) if kind == "drelu" else up)


def _load(layer: SplitLayer, count: int, device: str, *, unpack: bool) -> _HotLayer:
    def rows(kind: str) -> _Rows:
        row_type = RowType(layer.type_of(kind))
        source = np.ascontiguousarray(layer.rows(kind, 0, count))
        if not source.flags.writeable:
            source = source.copy()
        data = torch.from_numpy(source).to(device)
        return _Rows(row_type, dequantize(data, row_type, layer.width) if unpack else data)

    first, *factor, down = layer.kinds
    return _HotLayer(
        gate=rows(first),
        up=rows(factor[0]) if factor else None,
        down=rows(down),
        bias=None if layer.bias is None else torch.from_numpy(layer.bias[:count].copy()).to(device),
        neurons=count,
        width=layer.width,
    )


def _require_cuda() -> None:
    if not torch.cuda.is_available():
        built = torch.version.cuda or "none: a CPU build"
        raise HardwareError(
            f"--device cuda: torch {torch.__version__} (CUDA {built}) finds no usable GPU; "
            "use --device none to compute everything on the CPU"
        )


def _require_free(size: int) -> None:
    free, total = torch.cuda.mem_get_info()
    if size > free:
        raise HardwareError(
            f"--device cuda: the hot part needs {size} bytes, but {free} of the GPU's {total} are free; "
            "give a smaller --vram (the split point moves, nothing is reconverted) or use --device none"
        )
