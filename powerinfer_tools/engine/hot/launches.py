"""The launches of a block on a device, in the order of their dependencies; and fewer launches for the same
work, where fused kernels do several things at once for a single token."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from powerinfer_tools.engine.hot.cache import HotCache
from powerinfer_tools.engine.hot.elementwise import HotNorm, rotate
from powerinfer_tools.engine.hot.hot_ffn import FusedRows, Inputs
from powerinfer_tools.engine.hot.placed import Rotary
from powerinfer_tools.engine.hot.products import Product
from powerinfer_tools.engine.hot.work import Work
from powerinfer_tools.model.operations import Attention

Tensor = torch.Tensor
#: Matrices that one launch multiplies with.
MOST_PRODUCTS = 3


@dataclass(eq=False)
class Normed:
    """out = norm(x), also in the ``rounded`` forms, if they are read."""

    norm: HotNorm
    x: Tensor
    out: Tensor
    rounded: Inputs | None = None

    def __call__(self) -> None:
        """Launch it."""
        forms = self.rounded
        if forms is None:
            self.norm.into(self.x, self.out, None)
        else:
            self.norm.into(self.x, self.out, forms.rounded, forms.codes)


@dataclass(frozen=True, eq=False)
class Multiplied:
    """out (T, count) = product · inputs."""

    product: Product
    inputs: Inputs
    chunk: Tensor
    out: Tensor

    @property
    def fused(self) -> bool:
        """Whether a fused kernel does it."""
        return self.product.is_fused and len(self.out) == 1

    @property
    def taken(self) -> Tensor:
        """The input that a fused kernel takes."""
        return self.inputs.taken_by(self.product.rows.row_type)

    def __call__(self) -> None:
        """Launch it."""
        self.product.times(self.inputs, self.chunk, self.out)


@dataclass(frozen=True, eq=False)
class MultipliedTogether:
    """Products of one token's values with several matrices, by one kernel."""

    parts: Sequence[Multiplied]

    def __call__(self) -> None:
        """Launch it."""
        from powerinfer_kernels.triton_launch import matvecs

        rows = [part.product.rows for part in self.parts]
        planar = [matrix.planar for matrix in rows if isinstance(matrix, FusedRows)]
        outs, biases = [part.out for part in self.parts], [part.product.bias for part in self.parts]
        matvecs(self.parts[0].taken, planar, outs, biases)


@dataclass(frozen=True, eq=False)
class Joined:
    """x += factor · y."""

    x: Tensor
    y: Tensor
    factor: float

    def __call__(self) -> None:
        """Launch it."""
        if self.factor == 1.0:
            self.x.add_(self.y)
        else:
            self.x.add_(self.y, alpha=self.factor)


@dataclass(frozen=True, eq=False)
class MultipliedAndJoined:
    """A product that is added to ``x``, times a factor, and kept nowhere else."""

    part: Multiplied
    x: Tensor
    factor: float

    def __call__(self) -> None:
        """Launch it."""
        from powerinfer_kernels.triton_launch import matvec

        rows = self.part.product.rows
        assert isinstance(rows, FusedRows)
        matvec(self.part.taken, rows.planar, self.x, self.part.product.bias, self.factor)


@dataclass(frozen=True, eq=False)
class Rotation:
    """Rotate ``parts``, each with its number of heads, in place; ``first``: the first value of a head that is
    turned; ``fused``: of whole heads of one token, for which there is a kernel that takes two parts."""

    parts: Sequence[tuple[Tensor, int]]
    rotary: Rotary
    positions: Tensor
    head_dim: int
    first: int
    fused: bool

    def with_keys(self, other: object) -> "Rotation | None":
        """Both at once, if ``other`` rotates by the same angles."""
        if not isinstance(other, Rotation) or len(self.parts) > 1:
            return None
        if (other.rotary, other.first, other.head_dim) != (self.rotary, self.first, self.head_dim):
            return None
        return replace(self, parts=[*self.parts, *other.parts], fused=self.fused and other.fused)

    def __call__(self) -> None:
        """Launch it."""
        table, style = self.rotary, self.rotary.style
        if self.fused and len(self.parts) == 2:
            from powerinfer_kernels import triton_launch

            (query, _), (key, _) = self.parts
            triton_launch.rotate(
                query, key, table.cos, table.sin, self.positions, self.head_dim, neox=style != "norm"
            )
            return
        cos, sin = (part.index_select(0, self.positions) for part in (table.cos, table.sin))
        for x, heads in self.parts:
            rotate(x, cos, sin, heads, style, self.first)


@dataclass(eq=False)
class Attended:
    """Attention of one token by fused kernels, which read its position on the device, and store its key and
    value. The output is also in the ``rounded`` forms, if they are read. ``rotation``: the rotation of
    queries and keys before it."""

    query: Tensor
    key: Tensor
    value: Tensor
    cache: HotCache
    positions: Tensor
    scores: Tensor
    out: Tensor
    how: Attention
    rounded: Inputs | None = None
    rotation: Rotation | None = None

    def after(self, rotation: Rotation) -> "Attended | None":
        """Both at once, if ``rotation`` rotates this attention's queries and keys."""
        turned = [x for x, _ in rotation.parts]
        same = len(turned) == 2 and turned[0] is self.query and turned[1] is self.key
        return replace(self, rotation=rotation) if same and rotation.fused and self.rotation is None else None

    def __call__(self) -> None:
        """Launch it."""
        from powerinfer_kernels.triton_launch import Turn, attend

        turn, rounded, codes = None, None, None
        if self.rotation is not None:
            table = self.rotation.rotary
            turn = Turn(table.cos, table.sin, table.style != "norm")
        if self.rounded is not None:
            rounded, codes = self.rounded.rounded, self.rounded.codes
        attend(
            self.query, self.key, self.value, self.cache.keys, self.cache.values, self.positions, self.scores,
            self.out, rounded, codes,
            scale=self.how.scale, window=self.how.window, softcap=self.how.softcap, turn=turn,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class HostAttended:
    """Attention of queries whose first position is given by the host."""

    looks: Callable[[int, Tensor, Tensor], None]
    scores: Tensor
    out: Tensor

    def at(self, position: int) -> None:
        """Set the ``position`` of the first query."""
        self.looks(position, self.scores, self.out)

    def __call__(self) -> None:
        """Never: the position is missing."""
        raise AssertionError("the position is missing")


def fewer(launches: Sequence[Work]) -> list[Work]:
    """The same work with fewer launches: a launch is merged into the one before it where possible."""
    out: list[Work] = []
    for launch in launches:
        both = _both(out[-1], launch) if out else None
        if both is None:
            out.append(launch)
        else:
            out[-1] = both
    return out


def _both(first: Work, second: Work) -> Work | None:
    """Both launches as one; None where no kernel does that."""
    if isinstance(first, Rotation):
        return second.after(first) if isinstance(second, Attended) else first.with_keys(second)
    if isinstance(first, Multiplied) and isinstance(second, Joined):
        joins = first.fused and second.y is first.out
        return MultipliedAndJoined(first, second.x, second.factor) if joins else None
    if isinstance(second, Multiplied):
        parts = [first] if isinstance(first, Multiplied) else None
        if isinstance(first, MultipliedTogether):
            parts = list(first.parts)
        return _together(parts, second) if parts else None
    return None


def _together(parts: Sequence[Multiplied], more: Multiplied) -> Work | None:
    alike = parts[0].fused and more.fused and parts[0].product.columns == more.product.columns
    if not alike or len(parts) == MOST_PRODUCTS or parts[0].taken.data_ptr() != more.taken.data_ptr():
        return None
    return MultipliedTogether([*parts, more])
