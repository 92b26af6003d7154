"""The recurrent part of the vocabulary in float64, over a whole text from an empty state."""

import math

import numpy as np
import numpy.typing as npt

from powerinfer_kernels import reference, reference_recurrent
from powerinfer_tools.model.hyperparameter_types import RecurrentSizes
from powerinfer_tools.model.tensors import Table, Vector

Array = npt.NDArray[np.float64]


class RecurrentArrays:
    """These methods need nothing but their arguments."""

    def part(self, name: str, x: Array, first: int, count: int) -> Array:
        return x[:, first : first + count]

    def times(self, x: Array, y: Array | Vector, repeat: int = 1) -> Array:
        return x * np.repeat(y.astype(np.float64), repeat, axis=-1)

    def plus(self, x: Array, vector: Vector) -> Array:
        return x + vector.astype(np.float64)

    def unit_heads(self, x: Array, heads: int, eps: float) -> Array:
        return reference.l2_norm(x, eps, heads)

    def convolve(
        self, name: str, x: Array, weight: Table, bias: Vector | None, first: int, *, silu: bool
    ) -> Array:
        length, width = weight.shape
        out, _ = reference_recurrent.convolve(
            x[:, first : first + width],
            weight.astype(np.float64),
            None if bias is None else bias.astype(np.float64),
            np.zeros((length - 1, width)),
        )
        return reference.act(out, "silu") if silu else out

    def scan_channels(
        self, name: str, x: Array, steps: Array, vectors: Array, decay: Table, direct: Vector
    ) -> Array:
        size = len(decay)
        out, _ = reference_recurrent.scan_channels(
            x,
            steps,
            decay.astype(np.float64),
            vectors[:, :size],
            vectors[:, size:],
            direct.astype(np.float64),
            np.zeros(decay.shape),
        )
        return out

    def scan_heads(
        self, name: str, x: Array, steps: Array, decay: Vector, direct: Vector, sizes: RecurrentSizes
    ) -> Array:
        s, count = sizes, len(x)
        vectors = x[:, s.inner :].reshape(count, 2, s.groups, s.state)
        out, _ = reference_recurrent.scan_heads(
            x[:, : s.inner].reshape(count, s.heads, -1),
            steps,
            decay.astype(np.float64),
            vectors[:, 0],
            vectors[:, 1],
            direct.astype(np.float64),
            np.zeros((s.heads, s.state, s.inner // s.heads)),
        )
        return out.reshape(count, -1)

    def delta_net(
        self,
        name: str,
        both: Array,
        x: Array,
        decay: Array,
        rate: Array,
        sizes: RecurrentSizes,
        *,
        interleaved: bool,
    ) -> Array:
        s, count = sizes, len(x)
        repeats = s.heads // s.groups
        heads = [h // repeats if interleaved else h % s.groups for h in range(s.heads)]
        keys = both.reshape(count, 2, s.groups, s.state)[:, :, heads]
        out, _ = reference_recurrent.delta_net(
            keys[:, 0],
            keys[:, 1],
            x[:, x.shape[1] - s.inner :].reshape(count, s.heads, -1),
            decay.reshape(count, s.heads, -1),
            rate,
            1 / math.sqrt(s.state),
            np.zeros((s.heads, s.state, s.inner // s.heads)),
        )
        return out.reshape(count, -1)

    def general_delta(
        self,
        name: str,
        query: Array,
        key: Array,
        value: Array,
        decay: Array,
        unit: Array,
        rate: Array,
        heads: int,
    ) -> Array:
        q, k, v, d, u, r = (a.reshape(len(a), heads, -1) for a in (query, key, value, decay, unit, rate))
        zero = np.zeros((heads, q.shape[2], v.shape[2]))
        out, _ = reference_recurrent.general_delta(q, k, v, d, u, r, zero)
        return out.reshape(value.shape)
