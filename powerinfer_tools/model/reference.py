"""The forward pass once more, in float64 and as plainly as possible: what every engine path is compared with.

Weights are dequantised exactly; activations are never rounded. Slow, and meant for small models in tests.
"""

import numpy as np
import numpy.typing as npt

from powerinfer_formats.split import SplitLayer, SplitPredictor
from powerinfer_formats.split_predictors import SplitSigns
from powerinfer_kernels import RowType, dequantize, reference
from powerinfer_tools.model.architectures import ArchitectureSpec
from powerinfer_tools.model.ffn_matrices import DenseFFN, ExpertsFFN
from powerinfer_tools.model.hyperparameters import Hyperparameters
from powerinfer_tools.model.loading import AttentionWeights, LayerWeights, Model
from powerinfer_tools.model.tensors import Norm, Weight

Array = npt.NDArray[np.float64]


def forward(model: Model, tokens: list[int], *, half_cache: bool = False, predicted: bool = False) -> Array:
    """Logits (tokens, vocabulary), float64, of every position of ``tokens``, of a source or a split file.

    ``half_cache`` rounds keys and values to half precision, as the engine's cache does. ``predicted``
    computes only the neurons that a split file's predictors name.
    """
    hyper = model.hyper
    x = matrix(model.embedding)[tokens] * hyper.embedding_scale
    if model.positions is not None:
        first = model.spec.position_offset or 0
        x = x + matrix(model.positions)[first : first + len(tokens)]
    for index, layer in enumerate(model.layers):
        attended = attention_block(model, layer.attention, index, x, half_cache=half_cache)
        if model.spec.parallel:
            x = x + attended + ffn_block(hyper, layer, x, predicted=predicted)
        else:
            x = x + attended
            x = x + ffn_block(hyper, layer, x, predicted=predicted)
    x = normalize(x, model.output_norm, hyper.norm_eps)
    logits = x @ matrix(model.head).T
    if hyper.logit_softcap:
        logits = hyper.logit_softcap * np.tanh(logits / hyper.logit_softcap)
    return logits


def matrix(weight: Weight) -> Array:
    """``weight`` as float64 (rows, columns)."""
    return dequantize(weight.data, weight.row_type, weight.rows, weight.columns).astype(np.float64)


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
    hyper, eps, count = model.hyper, model.hyper.norm_eps, len(x)
    normed = normalize(x, w.norm, eps)
    query = _heads(_affine(normed, w.query, w.query_bias), hyper.heads)
    key = _heads(_affine(normed, w.key, w.key_bias), hyper.kv_heads)
    value = _heads(_affine(normed, w.value, w.value_bias), hyper.kv_heads)
    if w.query_norm is not None and w.key_norm is not None:
        query, key = normalize(query, w.query_norm, eps), normalize(key, w.key_norm, eps)
    local = hyper.local_layers[index]
    if hyper.rope_dim:
        angles = _angles(model, count, local)
        query, key = _rotate(query, angles, model.spec), _rotate(key, angles, model.spec)
    if half_cache:
        key, value = (a.astype(np.float16).astype(np.float64) for a in (key, value))
    group = hyper.heads // hyper.kv_heads
    key, value = np.repeat(key, group, axis=1), np.repeat(value, group, axis=1)
    scores = np.einsum("qhd,khd->hqk", query, key) * hyper.attention_scale
    if hyper.attention_softcap:
        scores = hyper.attention_softcap * np.tanh(scores / hyper.attention_softcap)
    scores = np.where(_visible(count, hyper.window if local else 0), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    attended = np.einsum("hqk,khd->qhd", weights, value).reshape(count, -1)
    out = _affine(attended, w.output, w.output_bias)
    return out if w.post_norm is None else normalize(out, w.post_norm, eps)


def ffn_block(hyper: Hyperparameters, layer: LayerWeights, x: Array, *, predicted: bool = False) -> Array:
    """What one layer's FFN adds to the residual stream ``x`` (tokens, width); with ``predicted``, of the
    neurons that the layer's predictor names alone: the weights of the others may be anything."""
    normed = normalize(x, layer.ffn_norm, hyper.norm_eps)
    if isinstance(layer.ffn, ExpertsFFN):
        out = experts_block(hyper, layer.ffn, normed)
    else:
        first, factor, down = ffn_matrices(layer)
        gate = _plus(normed @ first.T, layer.ffn_bias)
        up = None if factor is None else normed @ factor.T
        hidden = reference.activate(gate, up, hyper.activation, hyper.activation_cut)
        if predicted:
            named = predicted_neurons(layer, x, normed)
            sums = np.stack([row[some] @ down[some] for row, some in zip(hidden, named, strict=True)])
        else:
            sums = hidden @ down
        out = _plus(sums, layer.ffn_down_bias)
    return out if layer.ffn_post_norm is None else normalize(out, layer.ffn_post_norm, hyper.norm_eps)


def experts_block(hyper: Hyperparameters, ffn: ExpertsFFN, normed: Array) -> Array:
    """Σ weight · expert(x) over the experts with the largest weights, which are a softmax over all experts
    (arXiv 2401.04088), divided by their sum where the model says so; plus sigmoid(g·x) · shared expert(x)."""
    routing = hyper.routing
    assert routing is not None
    scores = normed @ matrix(ffn.router).T
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    out = np.zeros_like(normed)
    for token, row in enumerate(weights):
        chosen = np.argsort(-row, kind="stable")[: routing.used]
        total = row[chosen].sum() if routing.normalized else 1.0
        for expert in chosen:
            out[token] += row[expert] / total * _expert(hyper, ffn.expert(int(expert)), normed[token])
    if ffn.shared is not None and ffn.shared_gate is not None:
        gate = 1 / (1 + np.exp(-(normed @ matrix(ffn.shared_gate).T)))
        out += gate * _expert(hyper, ffn.shared, normed)
    return out


def _expert(hyper: Hyperparameters, ffn: DenseFFN, x: Array) -> Array:
    up = None if ffn.factor is None else x @ matrix(ffn.factor).T
    hidden = reference.activate(x @ matrix(ffn.first).T, up, hyper.activation, hyper.activation_cut)
    out: Array = hidden @ matrix(ffn.down).T
    return out


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
    None and down."""
    ffn = layer.ffn
    assert not isinstance(ffn, ExpertsFFN)
    if isinstance(ffn, DenseFFN):
        return matrix(ffn.first), None if ffn.factor is None else matrix(ffn.factor), matrix(ffn.down).T
    rows = [_split_rows(ffn.rows(kind, 0, ffn.neurons), ffn.type_of(kind), ffn.width) for kind in ffn.kinds]
    return rows[0], rows[1] if len(rows) == 3 else None, rows[-1]


def _split_rows(rows: npt.NDArray[np.uint8], row_type: int, width: int) -> Array:
    plain = np.ascontiguousarray(rows).reshape(-1)
    return dequantize(plain, RowType(row_type), len(rows), width).astype(np.float64)


def _affine(x: Array, weight: Weight, bias: npt.NDArray[np.float32] | None) -> Array:
    return _plus(x @ matrix(weight).T, bias)


def _plus(x: Array, bias: npt.NDArray[np.float32] | None) -> Array:
    return x if bias is None else x + bias.astype(np.float64)


def _heads(x: Array, heads: int) -> Array:
    return x.reshape(len(x), heads, -1)


def _visible(count: int, window: int) -> npt.NDArray[np.bool_]:
    query, key = np.arange(count)[:, None], np.arange(count)[None, :]
    return (key <= query) & ((query - key < window) if window else True)


def _angles(model: Model, count: int, local: bool) -> Array:
    hyper = model.hyper
    base, scale = (hyper.rope_local_base, 1.0) if local else (hyper.rope_base, hyper.rope_scale)
    frequencies = base ** -(np.arange(0, hyper.rope_dim, 2) / hyper.rope_dim) / scale
    if model.rope_factors is not None and not local:
        frequencies = frequencies / model.rope_factors
    return np.outer(np.arange(count), frequencies)


def _rotate(x: Array, angles: Array, spec: ArchitectureSpec) -> Array:
    """Rotate the pairs of each head (tokens, heads, head_dim) by ``angles`` (tokens, rope_dim / 2)."""
    half = angles.shape[1]
    interleaved = spec.rope_style == "norm"
    first = np.arange(half) * 2 if interleaved else np.arange(half)
    second = first + (1 if interleaved else half)
    cos, sin = np.cos(angles)[:, None, :], np.sin(angles)[:, None, :]
    out = x.copy()
    out[..., first] = x[..., first] * cos - x[..., second] * sin
    out[..., second] = x[..., first] * sin + x[..., second] * cos
    return out
