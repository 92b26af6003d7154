"""The vocabulary in float64, as plainly as possible: what every engine path is compared with.

Weights are dequantised exactly; activations are rounded only where asked for. Slow, and meant for small
models in tests.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from powerinfer_formats.split import SplitLayer, SplitPredictor
from powerinfer_formats.split_predictors import SplitSigns
from powerinfer_kernels import RowType, dequantize, reference, reference_experts, reference_quants
from powerinfer_tools.model import blocks
from powerinfer_tools.model.ffn_matrices import DenseFFN, ExpertsFFN
from powerinfer_tools.model.hyperparameter_types import PositionScale, Rope, Routing
from powerinfer_tools.model.layer_weights import AttentionWeights, LayerWeights
from powerinfer_tools.model.loading import Model
from powerinfer_tools.model.operations import Activation, Attention, HeadPart
from powerinfer_tools.model.reference_recurrent import RecurrentArrays
from powerinfer_tools.model.rotary import RopeFactors, position_factors, rotary_angles
from powerinfer_tools.model.tensors import Norm, Vector, Weight

Array = npt.NDArray[np.float64]
NO_FACTORS = RopeFactors()


def forward(
    model: Model,
    tokens: list[int],
    *,
    half_cache: bool = False,
    predicted: bool = False,
    rounded: bool = False,
) -> Array:
    """Logits (tokens, vocabulary), float64, of every position of ``tokens``, of a source or a split file.

    ``half_cache`` rounds keys and values to half precision, as the engine's cache does. ``predicted``
    computes only the neurons that a split file's predictors name. ``rounded`` rounds what quantised matrices
    of a source read to 8 bits, as the engine does.
    """
    ops = NumpyOperations(tokens, model.rope_factors, half_cache=half_cache, rounded=rounded)
    x = blocks.embedding(ops, model)
    along = blocks.along(ops, model, x)
    for index, layer in enumerate(model.layers):
        before, x = x, blocks.mix(ops, model.spec, model.hyper, index, layer, x, along)
        if layer.feeds is not None:
            read = before if model.hyper.parallel else x
            added = ffn_block(
                model, layer, read, index=index, predicted=predicted, before=before, rounded=rounded
            )
            x = ops.join(x, added, model.hyper.residual_scale)
        x = blocks.finish(ops, model.hyper, layer, x, along)
    return blocks.head(ops, model, model.head, blocks.merged(ops, model, x, along))


class NumpyOperations(RecurrentArrays):
    """The vocabulary in float64. A matrix is the file's, or an array (rows, columns)."""

    def __init__(
        self,
        tokens: list[int],
        rope_factors: RopeFactors = NO_FACTORS,
        *,
        half_cache: bool = False,
        rounded: bool = False,
    ) -> None:
        self._tokens, self._rope_factors = tokens, rope_factors
        self._half_cache, self._rounded = half_cache, rounded
        #: Keys and values of each layer, for later ones that have none.
        self._kept: dict[int, tuple[Array, Array]] = {}

    def embed(self, name: str, table: Weight, scale: float) -> Array:
        return matrix(table)[self._tokens] * scale

    def embed_positions(self, x: Array, table: Weight, offset: int) -> Array:
        out: Array = x + matrix(table)[offset : offset + len(x)]
        return out

    def norm(self, name: str, x: Array, norm: Norm, eps: float) -> Array:
        return normalize(x, norm, eps)

    def norm_heads(self, x: Array, heads: int, norm: Norm, eps: float) -> Array:
        if norm.weight.size == x.shape[1] and heads > 1:
            bias = None if norm.bias is None else norm.bias.reshape(heads, -1)
            norm = replace(norm, weight=norm.weight.reshape(heads, -1), bias=bias)
        return normalize(_heads(x, heads), norm, eps).reshape(x.shape)

    def linear(self, name: str, x: Array, weight: Weight | Array, bias: Vector | None = None) -> Array:
        rows = matrix(weight) if isinstance(weight, Weight) else weight
        if self._rounded and isinstance(weight, Weight) and not RowType(weight.row_type).is_float:
            x = in_8_bits(x)
        return _plus(x @ rows.T, bias)

    def rotate(self, x: Array, heads: int, head_dim: int, rope: Rope, first: int = 0) -> Array:
        angles = rotary_angles(rope, len(x), self._rope_factors)
        out = _heads(x, heads).copy()
        out[..., first:] = _rotate(out[..., first:], angles, rope.magnitude, interleaved=rope.style == "norm")
        return out.reshape(x.shape)

    def per_head(self, name: str, x: Array, matrices: Sequence[Weight | Array], rest: int) -> Array:
        heads, parts = _heads(x, len(matrices)), []
        for head, one in enumerate(matrices):
            rows = matrix(one) if isinstance(one, Weight) else one
            parts += [heads[:, head, : rows.shape[1]] @ rows.T, heads[:, head, rows.shape[1] :]]
            assert parts[-1].shape[1] == rest
        return np.concatenate(parts, axis=1)

    def gather_heads(self, name: str, heads: int, parts: Sequence[HeadPart[Array]]) -> Array:
        slices = [
            p.value[:, p.first + head * p.step : p.first + head * p.step + p.count]
            for head in range(heads)
            for p in parts
        ]
        return np.concatenate(slices, axis=1)

    def replace_first(self, x: Array, y: Array) -> Array:
        return np.concatenate([y, x[:, y.shape[1] :]], axis=1)

    def attend(self, query: Array, key: Array | None, value: Array | None, how: Attention) -> Array:
        count, query = len(query), _heads(query, how.heads)
        if key is None or value is None:
            key, value = self._kept[how.layer]
        else:
            key, value = _heads(key, how.kv_heads), _heads(value, how.kv_heads)
            if self._half_cache:
                key, value = (a.astype(np.float16).astype(np.float64) for a in (key, value))
            self._kept[how.layer] = (key, value)
        group = how.heads // how.kv_heads
        key, value = np.repeat(key, group, axis=1), np.repeat(value, group, axis=1)
        scores = np.einsum("qhd,khd->hqk", query, key) * how.scale
        if how.softcap:
            scores = self.softcap(scores, how.softcap)
        if how.alibi:
            distance = np.arange(count)[:, None] - np.arange(count)[None, :]
            scores = scores - reference.alibi_slopes(how.heads, how.alibi)[:, None, None] * distance
        scores = np.where(_visible(count, how.window, how.chunk), scores, -np.inf)
        sinks = np.full(how.heads, -np.inf) if how.sinks is None else how.sinks.astype(np.float64)
        top = np.maximum(scores.max(axis=-1), sinks[:, None])[..., None]
        weights = np.exp(scores - top)
        weights /= weights.sum(axis=-1, keepdims=True) + np.exp(sinks[:, None, None] - top)
        out: Array = np.einsum("hqk,khd->qhd", weights, value).reshape(count, -1)
        return out

    def activate(self, gate: Array, up: Array | None, how: Activation) -> Array:
        if how.kind == "xielu":
            return reference.xielu(gate, *how.constants)
        return reference.activate(gate, up, how.kind, how.cut)

    def combine(self, name: str, x: Array, factors: Array, width: int) -> Array:
        return reference.combine(x, factors, width)

    def keep_top(self, x: Array, deviations: float) -> Array:
        return reference.keep_top(x, deviations)

    def clamp(self, x: Array, limit: float) -> Array:
        return np.clip(x, -limit, limit)

    def join(self, x: Array, y: Array, factor: float = 1.0) -> Array:
        return x + factor * y

    def copy(self, name: str, x: Array) -> Array:
        return x

    def scale_by_position(self, x: Array, how: PositionScale) -> Array:
        out: Array = x * position_factors(how, len(x))[:, None]
        return out

    def scale(self, x: Array, factor: float) -> Array:
        return x * factor

    def softcap(self, x: Array, cap: float) -> Array:
        out: Array = cap * np.tanh(x / cap)
        return out

    def experts(
        self,
        scores: Array,
        x: Array,
        routing: Routing,
        expert: Callable[[int, Array], Array],
        choice_bias: Vector | None,
    ) -> Array:
        chosen, weights = reference_experts.route(
            scores,
            routing.used,
            kind=routing.kind,
            bias=None if choice_bias is None else choice_bias.astype(np.float64),
            groups=routing.groups,
            groups_used=routing.groups_used,
            normalized=routing.normalized,
            scale=routing.scale,
        )
        out = np.zeros_like(x)
        for token, k in np.ndindex(chosen.shape):
            row, weight = x[token : token + 1], weights[token, k]
            if routing.weigh_input:
                out[token] += expert(int(chosen[token, k]), row * weight)[0]
            else:
                out[token] += weight * expert(int(chosen[token, k]), row)[0]
        return out

    def weigh(self, x: Array, score: Array) -> Array:
        out: Array = x / (1 + np.exp(-score))
        return out


def matrix(weight: Weight) -> Array:
    """``weight`` as float64 (rows, columns)."""
    rows = dequantize(weight.data, weight.row_type, weight.rows, weight.columns).astype(np.float64)
    return rows if weight.scale == 1.0 else rows * weight.scale


def in_8_bits(x: Array) -> Array:
    """``x`` (tokens, columns) as products with quantised rows see it."""
    codes, scales, _ = reference_quants.quantize_activations(x.astype(np.float32))
    parts = codes.reshape(*scales.shape, -1).astype(np.float64)
    out: Array = (parts * scales[..., None].astype(np.float64)).reshape(x.shape)
    return out


def normalize(x: Array, norm: Norm, eps: float) -> Array:
    """x / sqrt(mean(x²) + eps) · weight + bias over the last axis (arXiv 1910.07467); with a "layer" norm x
    is x − mean(x) (arXiv 1607.06450)."""
    centred = x - x.mean(axis=-1, keepdims=True) if norm.kind == "layer" else x
    scale = np.sqrt(np.mean(centred * centred, axis=-1, keepdims=True) + eps)
    out: Array = centred / scale * norm.weight.astype(np.float64)
    return out if norm.bias is None else out + norm.bias.astype(np.float64)


def attention_block(
    model: Model, w: AttentionWeights, index: int, x: Array, *, half_cache: bool = False
) -> Array:
    """What layer ``index``'s attention adds to the residual stream ``x`` (tokens, width)."""
    ops = NumpyOperations([0] * len(x), model.rope_factors, half_cache=half_cache)
    return blocks.attention(ops, model.spec, model.hyper, index, w, x)


def ffn_block(
    model: Model,
    layer: LayerWeights,
    x: Array,
    *,
    index: int = 0,
    predicted: bool = False,
    before: Array | None = None,
    rounded: bool = False,
) -> Array:
    """What one layer's FFN adds to the residual stream ``x`` (tokens, width); with ``predicted``, of the
    neurons that the layer's predictor names alone: the weights of the others may be anything. ``before`` is
    the layer's input, which some families' routers or experts read."""
    hyper = model.hyper
    ops, eps = NumpyOperations([0] * len(x), rounded=rounded), hyper.norm_eps
    normed = blocks.ffn_input(ops, layer.ffn_norm, eps, x, layer.ffn_shift)
    if isinstance(layer.ffn, ExpertsFFN):
        inputs = blocks.expert_inputs(ops, model.spec, eps, layer.ffn, normed, x, before)
        out = blocks.experts(ops, model.spec, hyper, index, layer.ffn, normed, inputs)
    else:
        how = blocks.activation_of(hyper, index)
        if not predicted:
            biases = (layer.ffn_bias, layer.ffn_down_bias, layer.ffn_factor_bias)
            deviations = hyper.facts[index].deviations
            w = blocks.FFN(*_matrices(layer), *biases, layer.ffn_inner_norm, eps, deviations)
            out = blocks.ffn(ops, how, w, normed)
        else:
            first, factor, down = ffn_matrices(layer)
            gate = ops.linear("gate", normed, first, layer.ffn_bias)
            hidden = ops.activate(gate, None if factor is None else normed @ factor.T, how)
            named = predicted_neurons(layer, x, normed)
            sums = [row[some] @ down[some] for row, some in zip(hidden, named, strict=True)]
            out = _plus(np.stack(sums), layer.ffn_down_bias)
    return blocks.post_normed(ops, out, layer.ffn_post_norm, hyper.post_norm_eps)


def _matrices(layer: LayerWeights) -> tuple[Weight | Array, Weight | Array | None, Weight | Array]:
    """As blocks take them: those of a source as they are, whose types say whether inputs are rounded."""
    if isinstance(layer.ffn, DenseFFN):
        return layer.ffn.first, layer.ffn.factor, layer.ffn.down
    first, factor, down = ffn_matrices(layer)
    return first, factor, down.T


def predicted_neurons(layer: LayerWeights, x: Array, normed: Array) -> npt.NDArray[np.bool_]:
    """Which neurons a layer's predictor names, (tokens, neurons), from the residual stream ``x`` and the
    FFN's normalised input (tokens, width)."""
    return predictor_scores(layer, x, normed) > _predictor(layer).threshold


def predictor_scores(layer: LayerWeights, x: Array, normed: Array) -> Array:
    """outward · a(inward · input), or the agreement of signs, (tokens, neurons)."""
    predictor = _predictor(layer)
    if isinstance(predictor, SplitSigns):
        negative = np.unpackbits(predictor.signs, axis=1, count=x.shape[1], bitorder="little")
        return reference.sign_scores(normed, 1.0 - 2.0 * negative.astype(np.float64))
    source = x if predictor.residual else normed
    low = source @ _split_rows(predictor.inward, predictor.types[0], x.shape[1]).T
    if predictor.relu:
        low = np.maximum(low, 0.0)
    out: Array = low @ _split_rows(predictor.outward, predictor.types[1], predictor.rank).T
    return out


def _predictor(layer: LayerWeights) -> SplitPredictor:
    assert isinstance(layer.ffn, SplitLayer)
    assert layer.ffn.predictor is not None
    return layer.ffn.predictor


def ffn_matrices(layer: LayerWeights) -> tuple[Array, Array | None, Array]:
    """Gate, up and transposed down of one layer without experts, each (neurons, width); without gate, up,
    None and down. A dense layer of a split file that has the source's down projection computes with that."""
    ffn = layer.ffn
    assert not isinstance(ffn, ExpertsFFN)
    if isinstance(ffn, DenseFFN):
        return matrix(ffn.first), None if ffn.factor is None else matrix(ffn.factor), matrix(ffn.down).T
    rows = [_split_rows(ffn.rows(kind, 0, ffn.neurons), ffn.type_of(kind), ffn.width) for kind in ffn.kinds]
    if ffn.columns is not None:
        own = _split_rows(ffn.columns.rows, ffn.columns.row_type, ffn.neurons)
        rows[-1] = own.T[ffn.order]
    return rows[0], rows[1] if len(rows) == 3 else None, rows[-1]


def _split_rows(rows: npt.NDArray[np.uint8], row_type: int, width: int) -> Array:
    plain = np.ascontiguousarray(rows).reshape(-1)
    return dequantize(plain, RowType(row_type), len(rows), width).astype(np.float64)


def _plus(x: Array, bias: npt.NDArray[np.float32] | None) -> Array:
    return x if bias is None else x + bias.astype(np.float64)


def _heads(x: Array, heads: int) -> Array:
    return x.reshape(len(x), heads, -1)


def _visible(count: int, window: int, chunk: int) -> npt.NDArray[np.bool_]:
    query, key = np.arange(count)[:, None], np.arange(count)[None, :]
    seen = (key <= query) & ((query - key < window) if window else True)
    return seen & ((query // chunk == key // chunk) if chunk else True)


def _rotate(x: Array, angles: Array, magnitude: float, *, interleaved: bool) -> Array:
    """Rotate the pairs of each head (tokens, heads, head_dim) by ``angles`` (tokens, rope_dim / 2)."""
    half = angles.shape[1]
    first = np.arange(half) * 2 if interleaved else np.arange(half)
    second = first + (1 if interleaved else half)
    cos, sin = (magnitude * part[:, None, :] for part in (np.cos(angles), np.sin(angles)))
    out = x.copy()
    out[..., first] = x[..., first] * cos - x[..., second] * sin
    out[..., second] = x[..., first] * sin + x[..., second] * cos
    return out
