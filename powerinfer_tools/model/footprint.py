"""The footprint of a model's blocks: what :mod:`powerinfer_tools.model.counting` counts when it goes through
them."""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from powerinfer_formats.block_types import TensorType
from powerinfer_formats.split import SplitLayer
from powerinfer_formats.split_predictors import SplitLowRank, SplitPredictor
from powerinfer_tools.model import blocks
from powerinfer_tools.model.architectures import ArchitectureSpec
from powerinfer_tools.model.counting import HEAD_ROWS, Counted, CountingOperations, Footprint, KeyValues
from powerinfer_tools.model.ffn_matrices import DenseFFN, ExpertsFFN
from powerinfer_tools.model.hyperparameter_types import Hyperparameters
from powerinfer_tools.model.layer_weights import LayerWeights
from powerinfer_tools.model.loading import Model
from powerinfer_tools.model.matrices import MatrixShape
from powerinfer_tools.model.streams import Along

#: Among a model's attributes, as those of functools.cached_property are.
_KEPT = "_footprint"


@dataclass(frozen=True)
class ModelFootprint:
    """Of the embedding, of what mixes tokens and of the FFN of each layer, and of the output norm with the
    head, whose buffers are of :data:`~.counting.HEAD_ROWS` tokens."""

    embedding: Footprint
    mixing: tuple[Footprint, ...]
    feeding: tuple[Footprint, ...]
    head: Footprint

    @cached_property
    def body(self) -> Footprint:
        """All but the head."""
        return Footprint.sum((self.embedding, *self.mixing, *self.feeding))

    @property
    def packed_nbytes(self) -> int:
        """Matrices as the CPU kernels have them."""
        return self.body.packed_nbytes + self.head.packed_nbytes

    @property
    def bytes_by_type(self) -> dict[str, tuple[int, int]]:
        """The matrices that are multiplied with, by row type: bytes in the file, and packed."""
        sizes: dict[str, tuple[int, int]] = {}
        for matrix in self.body.matrices + self.head.matrices:
            file, packed = sizes.get(matrix.row_type.name, (0, 0))
            sizes[matrix.row_type.name] = (file + matrix.file_nbytes, packed + matrix.packed_nbytes)
        return dict(sorted(sizes.items(), key=lambda item: -item[1][1]))

    def session_bytes(self, context: int, kind: str) -> int:
        """What a session of ``context`` positions keeps: KV caches of type ``kind``, and the state of
        recurrent layers, now and at the end of the last prompt."""
        return self.body.cache_bytes(context, kind) + 2 * self.body.state_bytes

    def cache_bytes_read(self, position: int, kind: str) -> int:
        """Bytes of a session's KV caches that decoding at ``position`` reads."""
        return sum(count * cache.bytes_read(position, kind) for cache, count in self._alike.items())

    def scratch_bytes(self, batch: int, context: int) -> int:
        """Activations of ``batch`` tokens, and tables of ``context`` positions."""
        activations = batch * self.body.token_bytes + HEAD_ROWS * self.head.token_bytes
        return activations + self.body.table_bytes_of(context)

    @cached_property
    def _alike(self) -> Counter[KeyValues]:
        return Counter(self.body.caches)


def footprint_of(model: Model) -> ModelFootprint:
    """All of ``model``, a source model or a split file; counted once, and kept with it."""
    held: dict[str, object] = vars(model)
    counted = held.get(_KEPT)
    if not isinstance(counted, ModelFootprint):
        counted = held[_KEPT] = _counted(model)
    return counted


def _counted(model: Model) -> ModelFootprint:
    spec, hyper, ops = model.spec, model.hyper, _operations(model.hyper)
    along = blocks.along(ops, model, blocks.embedding(ops, model))
    ops.tokens(with_positions=model.positions is not None)
    for name in ("normed", "block_out"):
        ops.made(name, hyper.width)
    layers = [layer_footprint(spec, hyper, index, layer, along) for index, layer in enumerate(model.layers)]
    mixing, feeding = zip(*layers, strict=True)
    blocks.merged(ops, model, Counted("x", hyper.width), along)
    return ModelFootprint(ops.counted, mixing, feeding, head_footprint(model))


def layer_footprint(
    spec: ArchitectureSpec,
    hyper: Hyperparameters,
    index: int,
    w: LayerWeights,
    along: Along[Counted] | None = None,
) -> tuple[Footprint, Footprint]:
    """What mixes tokens in layer ``index`` with these weights, and its FFN; ``along`` is what runs beside."""
    mixing, feeding, x = _operations(hyper), _operations(hyper), Counted("x", hyper.width)
    along = Along() if along is None else along
    blocks.mix(mixing, spec, hyper, index, w, x, along)
    _feed(feeding, spec, hyper, index, w, x)
    blocks.finish(mixing, hyper, w, x, along)
    return mixing.counted, feeding.counted


def head_footprint(model: Model) -> Footprint:
    """The output norm and the head."""
    ops = CountingOperations()
    x = Counted("head_input", model.hyper.width)
    blocks.head(ops, model, model.head, x)
    return ops.counted


def _operations(hyper: Hyperparameters) -> CountingOperations:
    """With the buffers that the engine shares."""
    aliases = {"shared_out": "block_out", "scores": "scores_of_experts"}
    return CountingOperations(aliases if hyper.parallel else aliases | {"attention_input": "normed"})


def _feed(
    ops: CountingOperations,
    spec: ArchitectureSpec,
    hyper: Hyperparameters,
    index: int,
    layer: LayerWeights,
    x: Counted,
) -> None:
    """The FFN of a layer that has one."""
    ffn, how = layer.feeds, blocks.activation_of(hyper, index)
    if ffn is None:
        return
    normed = blocks.ffn_input(ops, layer.ffn_norm, hyper.norm_eps, x, layer.ffn_shift)
    if isinstance(ffn, ExpertsFFN):
        inputs = blocks.expert_inputs(ops, spec, hyper.norm_eps, ffn, normed, x, x)
        out = blocks.experts(ops, spec, hyper, index, ffn, normed, inputs)
    elif isinstance(ffn, DenseFFN):
        dense = blocks.dense_of(ffn, layer.ffn_bias, layer.ffn_down_bias)
        out = blocks.ffn(ops, how, dense, normed)
        ops.made("up", ffn.up.rows)  # also without a gate: space for kernels that skip rows
        ops.vectors(layer.ffn_factor_bias)
    else:
        out = _split_rows(ops, ffn, normed)
        ops.vectors(layer.ffn_bias, layer.ffn_down_bias)
    blocks.post_normed(ops, out, layer.ffn_post_norm, hyper.post_norm_eps)


def _split_rows(ops: CountingOperations, ffn: SplitLayer, normed: Counted) -> Counted:
    """The neurons of a split file, which has a row of down for each, and their predictor."""
    for name, kind in zip(("gate", "up"), ffn.kinds[:-1], strict=False):
        ops.rows(name, normed, MatrixShape(ffn.type_of(kind), ffn.neurons, ffn.width))
    ops.made("up", ffn.neurons)
    ops.matrices(MatrixShape(ffn.type_of("down"), ffn.neurons, ffn.width))
    if ffn.predictor is not None:
        _predictor(ops, ffn.predictor, ffn)
    return ops.made("block_out", ffn.width)


def _predictor(ops: CountingOperations, predictor: SplitPredictor, ffn: SplitLayer) -> None:
    ops.vectors(predictor.threshold)
    if not isinstance(predictor, SplitLowRank):
        ops.bits(predictor.signs)
        return
    inward, outward = (TensorType(row_type) for row_type in predictor.types)
    ops.matrices(MatrixShape(inward, predictor.rank, ffn.width))
    ops.matrices(MatrixShape(outward, ffn.neurons, predictor.rank))
