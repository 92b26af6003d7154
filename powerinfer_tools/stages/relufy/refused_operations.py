"""Operations of recurrent layers and latent attention: relufy takes no model with them, and says so by name
before it computes anything (:meth:`powerinfer_tools.model.loading.Model.require_plain`)."""

from collections.abc import Sequence

import torch

from powerinfer_tools.model.hyperparameters import PositionScale, RecurrentSizes
from powerinfer_tools.model.tensors import Table, Vector, Weight

Tensor = torch.Tensor


class RefusedOperations:
    """None of them is reached."""

    def part(self, name: str, x: Tensor, first: int, count: int) -> Tensor:
        """Not reached."""
        raise NotImplementedError

    def times(self, x: Tensor, y: Tensor | Vector, repeat: int = 1) -> Tensor:
        """Not reached."""
        raise NotImplementedError

    def scale_by_position(self, x: Tensor, how: PositionScale) -> Tensor:
        """Not reached."""
        raise NotImplementedError

    def plus(self, x: Tensor, vector: Vector) -> Tensor:
        """Not reached."""
        raise NotImplementedError

    def unit_heads(self, x: Tensor, heads: int, eps: float) -> Tensor:
        """Not reached."""
        raise NotImplementedError

    def convolve(
        self, name: str, x: Tensor, weight: Table, bias: Vector | None, first: int, *, silu: bool
    ) -> Tensor:
        """Not reached."""
        raise NotImplementedError

    def scan_channels(
        self, name: str, x: Tensor, steps: Tensor, vectors: Tensor, decay: Table, direct: Vector
    ) -> Tensor:
        """Not reached."""
        raise NotImplementedError

    def scan_heads(
        self, name: str, x: Tensor, steps: Tensor, decay: Vector, direct: Vector, sizes: RecurrentSizes
    ) -> Tensor:
        """Not reached."""
        raise NotImplementedError

    def delta_net(
        self,
        name: str,
        both: Tensor,
        x: Tensor,
        decay: Tensor,
        rate: Tensor,
        sizes: RecurrentSizes,
        *,
        interleaved: bool,
    ) -> Tensor:
        """Not reached."""
        raise NotImplementedError

    def per_head(self, name: str, x: Tensor, matrices: Sequence[Weight | Tensor], rest: int) -> Tensor:
        """Not reached."""
        raise NotImplementedError

    def replace_first(self, x: Tensor, y: Tensor) -> Tensor:
        """Not reached."""
        raise NotImplementedError
