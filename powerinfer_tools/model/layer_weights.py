"""What one layer of a model holds: its matrices, norms and vectors."""

from collections.abc import Iterator
from dataclasses import dataclass

from powerinfer_formats.split import SplitLayer
from powerinfer_kernels import RowType
from powerinfer_tools.model.ffn_matrices import DenseFFN, ExpertsFFN
from powerinfer_tools.model.latent import LatentWeights
from powerinfer_tools.model.recurrent import Recurrent
from powerinfer_tools.model.streams import Laurel, LayerInput, LayerStreams
from powerinfer_tools.model.tensors import Norm, Table, Vector, Weight


@dataclass(frozen=True)
class AttentionWeights:
    """Attention of one layer; norms and biases that the family does not have are None. Without ``key``, it
    reads what an earlier layer keeps; without ``value`` alone, values are the keys, before those are
    normalised and turned."""

    norm: Norm | None
    query: Weight
    key: Weight | None
    value: Weight | None
    output: Weight
    query_bias: Vector | None
    key_bias: Vector | None
    value_bias: Vector | None
    output_bias: Vector | None
    query_norm: Norm | None
    key_norm: Norm | None
    post_norm: Norm | None
    gate: Weight | None = None
    gate_bias: Vector | None = None
    sinks: Vector | None = None
    inner_norm: Norm | None = None
    value_norm: Norm | None = None
    laurel: Laurel | None = None


@dataclass(frozen=True)
class RecurrentWeights:
    """What mixes tokens in one layer without attention, or beside it."""

    norm: Norm
    mixer: Recurrent
    post_norm: Norm | None = None


@dataclass(frozen=True)
class LayerWeights:
    """All weights of one layer. ``ffn`` is a :class:`DenseFFN` or :class:`ExpertsFFN`, or a layer of a split
    file. A layer without attention has no ``attends``, one without FFN no ``feeds``; whoever knows that it
    has one asks for ``attention`` or ``ffn``.

    ``ffn_bias`` is added to what the activation reads, one value per neuron in the order of ``ffn``,
    ``ffn_factor_bias`` to the products with up of a gated FFN, ``ffn_down_bias`` to the output. ``streams``
    and ``input`` are what the layer has beside the residual stream, which is times ``output_scale`` at its
    end. ``ffn_shift`` (2, width) mixes the FFN's input with that of the token before;
    ``embedding_share`` of the embedding is added at the end.
    """

    attends: AttentionWeights | LatentWeights | None
    ffn_norm: Norm | None
    feeds: DenseFFN | ExpertsFFN | SplitLayer | None
    ffn_bias: Vector | None
    ffn_down_bias: Vector | None
    ffn_post_norm: Norm | None
    recurs: RecurrentWeights | None = None
    ffn_factor_bias: Vector | None = None
    ffn_inner_norm: Norm | None = None
    streams: LayerStreams | None = None
    input: LayerInput | None = None
    output_scale: float = 1.0
    ffn_shift: Table | None = None
    embedding_share: float = 0.0

    @property
    def attention(self) -> AttentionWeights:
        """The attention, of a layer that has one."""
        assert isinstance(self.attends, AttentionWeights)
        return self.attends

    @property
    def ffn(self) -> DenseFFN | ExpertsFFN | SplitLayer:
        """The FFN, of a layer that has one."""
        assert self.feeds is not None
        return self.feeds

    @property
    def source_ffn(self) -> DenseFFN:
        """The matrices of a source model, see :attr:`Model.is_source`."""
        if isinstance(self.ffn, DenseFFN):
            return self.ffn
        layer = self.ffn
        assert isinstance(layer, SplitLayer), "stages that want one FFN refuse models with experts"
        rows = {kind: _whole(layer, kind) for kind in layer.kinds}
        return DenseFFN(rows.get("gate"), rows["up"], rows["down"], transposed=True)


def mixing_weights(layer: LayerWeights) -> Iterator[Weight]:
    """All matrices of what mixes the tokens of a layer: attention, a recurrent block, or both; and of what it
    has beside the residual stream."""
    laurel = layer.attends.laurel if isinstance(layer.attends, AttentionWeights) else None
    mixer = None if layer.recurs is None else layer.recurs.mixer
    for block in (layer.attends, mixer, laurel, layer.streams, layer.input):
        for part in () if block is None else vars(block).values():
            yield from (
                one for one in (part if isinstance(part, tuple) else (part,)) if isinstance(one, Weight)
            )


def _whole(layer: SplitLayer, kind: str) -> Weight:
    """All rows of one kind of a split layer, as one matrix."""
    rows = layer.rows(kind, 0, layer.neurons)
    name = f"blk.{layer.index}.ffn_{kind}"
    return Weight(name, RowType(layer.type_of(kind)), layer.neurons, layer.width, rows.reshape(-1))
