"""A differentiable forward pass of the models that the engine runs, in torch.

Weights are dequantised once; matrix products have the precision asked for, and the residual stream, norms
and softmax are float32. The FFN is an argument of the pass, so that the same frozen attention serves
teacher and student.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from powerinfer_kernels import dequantize
from powerinfer_tools.engine.hot.limits import attention_limit, head_limit
from powerinfer_tools.errors import ModelError
from powerinfer_tools.model.ffn_matrices import DenseFFN
from powerinfer_tools.model.loading import AttentionWeights, Model
from powerinfer_tools.model.rotary import RotaryTables, rope_tables
from powerinfer_tools.model.tensors import Norm, Vector, Weight

Tensor = torch.Tensor
#: An FFN: layer index and its normalised input (tokens, width) to what it adds (tokens, width).
FFN = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True)
class Rotation:
    """cos and sin of every position (positions, 1, rope_dim / 2)."""

    cos: Tensor
    sin: Tensor


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


class Network:
    """The frozen parts of ``model`` on ``device``; ``ffn_base`` holds gate, up and down of every layer, or up
    and down where the FFN has no gate."""

    def __init__(self, model: Model, device: str, window: int, precision: torch.dtype) -> None:
        if model.is_split:
            raise ModelError(f"{model.path} is a split file; start from the source model")
        model.require_one_ffn(ModelError, "training")
        if model.hyper.logit_softcap or model.hyper.attention_softcap:
            raise ModelError(f"{model.path}: models with soft-capped scores cannot be trained here yet")
        limit = attention_limit(model) or head_limit(model)
        if limit is not None:
            raise ModelError(f"{model.path}: models with {limit} cannot be trained here yet")
        self.hyper, self.device, self.precision = model.hyper, device, precision
        self.parallel = model.hyper.parallel
        self.interleaved = model.spec.rope_style == "norm"
        self.embedding = self._matrix(model.embedding)
        self.head = self.embedding if model.head is model.embedding else self._matrix(model.head)
        self.positions = self._positions(model)
        self.output_norm = TorchNorm(self, model.output_norm)
        self.layers = [_Attention(self, layer.attention) for layer in model.layers]
        self.ffn_norms = [TorchNorm(self, layer.ffn_norm) for layer in model.layers]
        self.post_norms = [_optional_norm(self, layer.ffn_post_norm) for layer in model.layers]
        self.ffn_biases = [self._optional(layer.ffn_bias) for layer in model.layers]
        self.down_biases = [self._optional(layer.ffn_down_bias) for layer in model.layers]
        self.ffn_base = [self._ffn(layer.ffn) for layer in model.layers]
        tables = rope_tables(model.hyper, window, model.rope_factors)
        self.rotations = {rope: self._rotation(table) for rope, table in tables.items()}

    def embed(self, tokens: Tensor) -> Tensor:
        """The residual stream (windows, positions, width) float32 before the first layer."""
        x = self.embedding[tokens].float() * self.hyper.embedding_scale
        return x if self.positions is None else x + self.positions[: tokens.shape[-1]].float()

    def attend(self, index: int, x: Tensor) -> Tensor:
        """The residual stream after layer ``index``'s attention."""
        rope = self.hyper.facts[index].rope
        rotation = None if rope is None else self.rotations[rope]
        return x + self.layers[index](x, rotation, self._mask(index, x))

    def ffn_input(self, index: int, x: Tensor) -> Tensor:
        """The normalised input of layer ``index``'s FFN, in the training precision."""
        return self.ffn_norms[index](x).to(self.precision)

    def add_ffn(self, index: int, x: Tensor, out: Tensor) -> Tensor:
        """The residual stream after the FFN gave ``out``."""
        norm = self.post_norms[index]
        return x + (out.float() if norm is None else norm(out.float()))

    def through_attention(self, index: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """What layer ``index``'s FFN reads, and the residual stream after its attention."""
        attended = self.attend(index, x)
        return self.ffn_input(index, x if self.parallel else attended), attended

    def hidden(self, tokens: Tensor, ffn: FFN) -> Tensor:
        """The input of the head, (windows, positions, width), for token ids (windows, positions)."""
        x = self.embed(tokens)
        for index in range(self.hyper.layers):
            read, x = self.through_attention(index, x)
            x = self.add_ffn(index, x, ffn(index, read))
        return self.output_norm(x).to(self.precision)

    @property
    def gated_base(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """``ffn_base`` of a model whose FFNs all have a gate."""
        return [(gate, up, down) for gate, up, down in self.ffn_base]

    def dense_ffn(self, index: int, x: Tensor) -> Tensor:
        """The model's own FFN."""
        first, *factor, down = self.ffn_base[index]
        gate = _linear(x, first, self.ffn_biases[index])
        up = functional.linear(x, factor[0]) if factor else None
        hidden = activate(self.hyper.activation, gate, up, self.hyper.activation_cut)
        return _linear(hidden, down, self.down_biases[index])

    def _mask(self, index: int, x: Tensor) -> Tensor | None:
        window = self.hyper.facts[index].window
        if not window or x.shape[1] <= window:
            return None
        place = torch.arange(x.shape[1], device=self.device)
        distance = place[:, None] - place[None, :]
        return (distance >= 0) & (distance < window)

    def _ffn(self, ffn: object) -> tuple[Tensor, ...]:
        assert isinstance(ffn, DenseFFN)
        return tuple(self._matrix(weight) for weight in ffn.matrices)

    def _positions(self, model: Model) -> Tensor | None:
        first = model.spec.position_offset
        return None if model.positions is None else self._matrix(model.positions)[first:]

    def _matrix(self, weight: Weight) -> Tensor:
        values = dequantize(weight.data, weight.row_type, weight.rows, weight.columns)
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device, self.precision)

    def _vector(self, values: Vector) -> Tensor:
        return torch.from_numpy(values.copy()).to(self.device)

    def _optional(self, values: Vector | None) -> Tensor | None:
        return None if values is None else self._vector(values)

    def _rotation(self, tables: RotaryTables) -> Rotation:
        cos, sin = (torch.from_numpy(table)[:, None, :].to(self.device) for table in (tables.cos, tables.sin))
        return Rotation(cos, sin)


class _Attention:
    """Attention of one layer; called with the residual stream, it returns what it adds."""

    def __init__(self, network: Network, weights: AttentionWeights) -> None:
        self.network, hyper = network, network.hyper
        self.norm = TorchNorm(network, weights.norm)
        self.projections = [
            (network._matrix(weight), network._optional(bias), heads, _optional_norm(network, norm))
            for weight, bias, heads, norm in (
                (weights.query, weights.query_bias, hyper.heads, weights.query_norm),
                (weights.key, weights.key_bias, hyper.kv_heads, weights.key_norm),
                (weights.value, weights.value_bias, hyper.kv_heads, None),
            )
        ]
        self.output = network._matrix(weights.output)
        self.output_bias = network._optional(weights.output_bias)
        self.post_norm = _optional_norm(network, weights.post_norm)

    def __call__(self, x: Tensor, rotation: Rotation | None, mask: Tensor | None) -> Tensor:
        network, hyper = self.network, self.network.hyper
        normed = self.norm(x).to(network.precision)
        query, key, value = (self._project(normed, *projection) for projection in self.projections)
        if rotation is not None:
            query, key = (rotate(part, rotation, network.interleaved) for part in (query, key))
        attended = functional.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None,
            scale=hyper.attention_scale,
            enable_gqa=hyper.heads != hyper.kv_heads,
        )
        out = functional.linear(attended.transpose(1, 2).flatten(2), self.output)
        out = out.float() if self.output_bias is None else out.float() + self.output_bias
        return out if self.post_norm is None else self.post_norm(out)

    def _project(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, heads: int, norm: "TorchNorm | None"
    ) -> Tensor:
        out = _linear(x, weight, bias)
        out = out.reshape(*out.shape[:-1], heads, -1)
        return out if norm is None else norm(out.float()).to(x.dtype)


class TorchNorm:
    """A :class:`~powerinfer_tools.model.tensors.Norm` over the last axis, float32."""

    def __init__(self, network: Network, norm: Norm) -> None:
        self.kind, self.eps = norm.kind, network.hyper.norm_eps
        self.weight, self.bias = network._vector(norm.weight), network._optional(norm.bias)

    def __call__(self, x: Tensor) -> Tensor:
        """The normalised ``x``."""
        size = (x.shape[-1],)
        if self.kind == "rms":
            return functional.rms_norm(x.float(), size, self.weight, self.eps)
        return functional.layer_norm(x.float(), size, self.weight, self.bias, self.eps)


def _optional_norm(network: Network, norm: Norm | None) -> TorchNorm | None:
    return None if norm is None else TorchNorm(network, norm)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


def rotate(x: Tensor, rotation: Rotation, interleaved: bool) -> Tensor:
    """Rotate the pairs of each head (windows, positions, heads, head_dim)."""
    half = rotation.cos.shape[-1]
    cos, sin = rotation.cos[: x.shape[1]], rotation.sin[: x.shape[1]]
    turned, rest = x[..., : 2 * half].float(), x[..., 2 * half :]
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned[..., :half], turned[..., half:]
    pair = (first * cos - second * sin, first * sin + second * cos)
    out = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat((out.to(x.dtype), rest), dim=-1)
