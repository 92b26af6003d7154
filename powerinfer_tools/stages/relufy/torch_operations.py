"""The vocabulary of :mod:`powerinfer_tools.model.operations` in torch, with gradients: values are
(windows, positions, width).

The residual stream, norms and softmax are float32; matrix products have the precision asked for.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch.nn import functional

from powerinfer_kernels import dequantize
from powerinfer_tools.model.hyperparameter_types import PositionScale, Rope, Routing
from powerinfer_tools.model.operations import Activation, Attention
from powerinfer_tools.model.refused_operations import WithoutRecurrence, WithoutStreams
from powerinfer_tools.model.rotary import RotaryTables, position_factors
from powerinfer_tools.model.tensors import Norm, Vector, Weight

Tensor = torch.Tensor
#: The names of what goes to the residual stream, which stays in float32.
_OUTPUTS = frozenset({"block_out"})

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu_tanh": lambda gate: functional.gelu(gate, approximate="tanh"),
    "gelu_erf": functional.gelu,
    "relu": functional.relu,
    "relu2": lambda gate: functional.relu(gate).square(),
    "drelu": functional.relu,
}


def activate(kind: str, gate: Tensor, up: Tensor | None, cut: float = 0.0) -> Tensor:
    """act(gate)·up as the architecture table names it; act(gate) without up. ``cut`` is that of fatrelu."""
    act = functional.threshold(gate, cut, 0.0) if kind == "fatrelu" else _ACTIVATIONS[kind](gate)
    if up is None:
        return act
    return act * (functional.relu(up) if kind == "drelu" else up)


class TorchOperations(WithoutRecurrence[Tensor, Weight | Tensor], WithoutStreams[Tensor]):
    """Weights are dequantised when they are first used, and kept; ``tokens`` (windows, positions) is what
    :meth:`embed` reads next."""

    place = "training"

    def __init__(self, device: str, precision: torch.dtype, tables: Mapping[Rope, RotaryTables]) -> None:
        self.device, self.precision = device, precision
        self.tokens: Tensor | None = None
        self._held: dict[int, tuple[Weight | Vector, Tensor]] = {}
        self._rotations = {
            rope: tuple(torch.from_numpy(part)[:, None, :].to(device) for part in (table.cos, table.sin))
            for rope, table in tables.items()
        }

    def matrix(self, weight: Weight) -> Tensor:
        """``weight`` (rows, columns) in the precision of products."""
        if id(weight) not in self._held:
            values = dequantize(weight.data, weight.row_type, weight.rows, weight.columns)
            made = torch.from_numpy(np.ascontiguousarray(values)).to(self.device, self.precision)
            self._held[id(weight)] = (weight, made)
        return self._held[id(weight)][1]

    def embed(self, name: str, table: Weight, scale: float) -> Tensor:
        """In float32."""
        assert self.tokens is not None
        return self.matrix(table)[self.tokens].float() * scale

    def embed_positions(self, x: Tensor, table: Weight, offset: int) -> Tensor:
        """In float32."""
        return x + self.matrix(table)[offset : offset + x.shape[-2]].float()

    def norm(self, name: str, x: Tensor, norm: Norm, eps: float) -> Tensor:
        """In float32; what matrices read is rounded to their precision then."""
        size, weight, bias = (x.shape[-1],), self._vector(norm.weight), self._optional(norm.bias)
        if norm.kind == "rms":
            out = functional.rms_norm(x.float(), size, weight, eps)
        else:
            out = functional.layer_norm(x.float(), size, weight, bias, eps)
        return out if name in _OUTPUTS else out.to(self.precision)

    def norm_heads(self, x: Tensor, heads: int, norm: Norm, eps: float) -> Tensor:
        """See :meth:`norm`."""
        return self.norm("heads", _heads(x, heads), norm, eps).flatten(-2)

    def linear(self, name: str, x: Tensor, weight: Weight | Tensor, bias: Vector | None = None) -> Tensor:
        """In the precision of products."""
        rows = self.matrix(weight) if isinstance(weight, Weight) else weight
        x = x.to(self.precision)
        return functional.linear(x, rows, None if bias is None else self._vector(bias).to(x.dtype))

    def rotate(self, x: Tensor, heads: int, head_dim: int, rope: Rope, first: int = 0) -> Tensor:
        """In float32, rounded as before."""
        cos, sin = self._rotations[rope]
        parts = _heads(x, heads)
        turned = _rotate(parts[..., first:], cos, sin, interleaved=rope.style == "norm")
        return torch.cat((parts[..., :first], turned), dim=-1).flatten(-2)

    def attend(self, query: Tensor, key: Tensor | None, value: Tensor | None, how: Attention) -> Tensor:
        """Over the window of tokens alone; scores are not soft-capped here."""
        assert key is not None
        assert value is not None, "layers without keys are refused before"
        assert how.sinks is None, "refused before"
        assert not how.softcap + how.alibi + how.chunk, "refused before"
        query, key, value = (
            _heads(x, heads).transpose(1, 2)
            for x, heads in ((query, how.heads), (key, how.kv_heads), (value, how.kv_heads))
        )
        mask = self._mask(query.shape[2], how.window)
        attended = functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            scale=how.scale,
            enable_gqa=how.heads != how.kv_heads,
        )
        return attended.transpose(1, 2).flatten(2)

    def activate(self, gate: Tensor, up: Tensor | None, how: Activation) -> Tensor:
        """See :func:`activate`."""
        return activate(how.kind, gate, up, how.cut)

    def clamp(self, x: Tensor, limit: float) -> Tensor:
        """x between −limit and limit."""
        return x.clamp(-limit, limit)

    def join(self, x: Tensor, y: Tensor, factor: float = 1.0) -> Tensor:
        """In float32."""
        return x + (y.float() if factor == 1.0 else factor * y.float())

    def copy(self, name: str, x: Tensor) -> Tensor:
        """x in the precision of products."""
        return x.to(self.precision)

    def scale(self, x: Tensor, factor: float) -> Tensor:
        """x · factor."""
        return x * factor

    def scale_by_position(self, x: Tensor, how: PositionScale) -> Tensor:
        """In float32, rounded as before."""
        factors = torch.from_numpy(position_factors(how, x.shape[-2])).to(self.device, torch.float32)
        return (x.float() * factors[:, None]).to(x.dtype)

    def times(self, x: Tensor, y: Tensor | Vector, repeat: int = 1) -> Tensor:
        """x · y, each value of y for ``repeat`` columns."""
        factors = y if isinstance(y, Tensor) else self._vector(y)
        return (x.reshape(*x.shape[:-1], -1, repeat) * factors[..., None]).flatten(-2)

    def plus(self, x: Tensor, vector: Vector) -> Tensor:
        """x + ``vector``."""
        return x + self._vector(vector)

    def softcap(self, x: Tensor, cap: float) -> Tensor:
        """cap · tanh(x / cap)."""
        return cap * torch.tanh(x / cap)

    def experts(
        self,
        scores: Tensor,
        x: Tensor,
        routing: Routing,
        expert: Callable[[int, Tensor], Tensor],
        choice_bias: Vector | None,
    ) -> Tensor:
        """Every expert computes every token, with weight zero where the token does not take it."""
        assert routing.plain, "models with other routers are refused"
        assert choice_bias is None, "models with other routers are refused"
        weights = scores.float().softmax(-1)
        best, chosen = weights.topk(routing.used, -1)
        if routing.normalized:
            best = best / best.sum(-1, keepdim=True)
        shares = torch.zeros_like(weights).scatter(-1, chosen, best)
        parts = (
            expert(index, x).float() * shares[..., index : index + 1] for index in range(routing.experts)
        )
        return torch.stack(tuple(parts)).sum(0)

    def weigh(self, x: Tensor, score: Tensor) -> Tensor:
        """sigmoid(score) · x."""
        return torch.sigmoid(score.float()) * x.float()

    def _mask(self, positions: int, window: int) -> Tensor | None:
        if not window or positions <= window:
            return None
        place = torch.arange(positions, device=self.device)
        distance = place[:, None] - place[None, :]
        return (distance >= 0) & (distance < window)

    def _vector(self, values: Vector) -> Tensor:
        if id(values) not in self._held:
            self._held[id(values)] = (values, torch.from_numpy(values.copy()).to(self.device))
        return self._held[id(values)][1]

    def _optional(self, values: Vector | None) -> Tensor | None:
        return None if values is None else self._vector(values)


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.reshape(*x.shape[:-1], heads, -1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """Rotate the pairs of each head (windows, positions, heads, head_dim)."""
    half = cos.shape[-1]
    cos, sin = cos[: x.shape[1]], sin[: x.shape[1]]
    turned, rest = x[..., : 2 * half].float(), x[..., 2 * half :]
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned[..., :half], turned[..., half:]
    pair = (first * cos - second * sin, first * sin + second * cos)
    out = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat((out.to(x.dtype), rest), dim=-1)
