"""A differentiable forward pass of the models that the engine runs: the blocks of
:mod:`powerinfer_tools.model.blocks` in torch.

The FFN is an argument of the pass, so that the same frozen attention serves teacher and student.
"""

from collections.abc import Callable

import torch

from powerinfer_tools.errors import ModelError
from powerinfer_tools.model import blocks
from powerinfer_tools.model.ffn_matrices import DenseFFN
from powerinfer_tools.model.loading import Model
from powerinfer_tools.model.rotary import rope_tables
from powerinfer_tools.stages.relufy.torch_operations import TorchOperations, activate

__all__ = ["FFN", "Network", "Tensor", "activate"]

Tensor = torch.Tensor
#: An FFN: layer index and its normalised input (tokens, width) to what it adds (tokens, width).
FFN = Callable[[int, Tensor], Tensor]


class Network:
    """The frozen parts of ``model`` on ``device``; ``ffn_base`` holds gate, up and down of every layer, or up
    and down where the FFN has no gate."""

    def __init__(self, model: Model, device: str, window: int, precision: torch.dtype) -> None:
        if model.is_split:
            raise ModelError(f"{model.path} is a split file; start from the source model")
        model.require_one_ffn(ModelError, "training")
        if model.hyper.logit_softcap or model.hyper.attention_softcap:
            raise ModelError(f"{model.path}: models with soft-capped scores cannot be trained here yet")
        if model.hyper.alibi or any(layer.attention.sinks is not None for layer in model.layers):
            raise ModelError(f"{model.path}: models with ALiBi or attention sinks cannot be trained here yet")
        if model.head_bias is not None or model.hyper.logit_scale != 1.0:
            raise ModelError(
                f"{model.path}: models with a scale or bias of logits cannot be trained here yet"
            )
        self.model, self.hyper, self.device, self.precision = model, model.hyper, device, precision
        self.ops = TorchOperations(device, precision, rope_tables(model.hyper, window, model.rope_factors))
        self.embedding = self.ops.matrix(model.embedding)
        self.head = self.ops.matrix(model.head)
        self.post_norms = [layer.ffn_post_norm for layer in model.layers]
        self.ffn_base = [self._ffn(layer.ffn) for layer in model.layers]

    def embed(self, tokens: Tensor) -> Tensor:
        """The residual stream (windows, positions, width) float32 before the first layer."""
        self.ops.tokens = tokens
        return blocks.embedding(self.ops, self.model)

    def attend(self, index: int, x: Tensor) -> Tensor:
        """The residual stream after layer ``index``'s attention."""
        weights = self.model.layers[index].attention
        out = blocks.attention(self.ops, self.model.spec, self.hyper, index, weights, x)
        return self.ops.join(x, out, self.hyper.residual_scale)

    def ffn_input(self, index: int, x: Tensor) -> Tensor:
        """The normalised input of layer ``index``'s FFN, in the training precision."""
        return blocks.ffn_input(self.ops, self.model.layers[index].ffn_norm, self.hyper.norm_eps, x)

    def add_ffn(self, index: int, x: Tensor, out: Tensor) -> Tensor:
        """The residual stream after the FFN gave ``out``."""
        normed = blocks.post_normed(self.ops, out, self.post_norms[index], self.hyper.post_norm_eps)
        return self.ops.join(x, normed, self.hyper.residual_scale)

    def through_attention(self, index: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """What layer ``index``'s FFN reads, and the residual stream after its attention."""
        attended = self.attend(index, x)
        return self.ffn_input(index, x if self.hyper.parallel else attended), attended

    def hidden(self, tokens: Tensor, ffn: FFN) -> Tensor:
        """The input of the head, (windows, positions, width), for token ids (windows, positions)."""
        x = self.embed(tokens)
        for index in range(self.hyper.layers):
            read, x = self.through_attention(index, x)
            x = self.add_ffn(index, x, ffn(index, read))
        return self.ops.norm("head_input", x, self.model.output_norm, self.hyper.norm_eps)

    @property
    def gated_base(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """``ffn_base`` of a model whose FFNs all have a gate."""
        return [(gate, up, down) for gate, up, down in self.ffn_base]

    def dense_ffn(self, index: int, x: Tensor) -> Tensor:
        """The model's own FFN."""
        first, *factor, down = self.ffn_base[index]
        layer = self.model.layers[index]
        weights = blocks.FFN(first, factor[0] if factor else None, down, layer.ffn_bias, layer.ffn_down_bias)
        return blocks.ffn(self.ops, blocks.activation_of(self.hyper), weights, x)

    def _ffn(self, ffn: object) -> tuple[Tensor, ...]:
        assert isinstance(ffn, DenseFFN)
        return tuple(self.ops.matrix(weight) for weight in ffn.matrices)
