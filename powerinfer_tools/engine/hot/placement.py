"""What of a model is on the hot device: what the plan says, or less where memory is short."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from powerinfer_formats.split import SplitLayer
from powerinfer_tools.engine.hot import expert_placement, sizes
from powerinfer_tools.engine.hot.expert_placement import HotCounts
from powerinfer_tools.engine.hot.sizes import HotSize, Widths
from powerinfer_tools.model.ffn_matrices import ExpertsFFN
from powerinfer_tools.model.hyperparameters import Hyperparameters
from powerinfer_tools.model.loading import LayerWeights, Model

#: Each piece starts on such a boundary of the device's memory.
ALIGNMENT = 256


@dataclass(frozen=True)
class Workload:
    """What memory is for: batches of up to ``tokens``, ``context`` positions in a cache of ``kv_type``;
    ``predicted`` layers are computed in this mode; with ``check_recall`` it is counted what their predictors
    find."""

    tokens: int
    context: int
    kv_type: str = "f16"
    predicted: frozenset[int] = frozenset()
    check_recall: bool = False


@dataclass(frozen=True)
class HotUnits:
    """What is on the hot device: the first ``neurons`` of each layer, the attention blocks of some, the
    ``predictors`` of some that have neurons there, and the output norm with the head or not. Of a mixture of
    experts, ``experts`` of each layer instead of neurons; attention takes the router along."""

    neurons: tuple[int, ...]
    attention: tuple[bool, ...]
    predictors: tuple[bool, ...]
    head: bool = False
    experts: tuple[HotCounts, ...] = ()

    def names(self, layer: int) -> bool:
        """Whether the predictor of ``layer`` is there. It speaks for hot neurons first: without any, the host
        predicts for itself."""
        return self.predictors[layer] and self.neurons[layer] > 0

    def __bool__(self) -> bool:
        return any(self.neurons) or any(self.experts) or any(self.attention) or self.head

    @property
    def without_ffns(self) -> "HotUnits":
        """The same with all neurons, or experts, on the CPU."""
        none = (HotCounts(0, shared=False),) * len(self.experts)
        return replace(self, neurons=(0,) * len(self.neurons), experts=none)


def hot_size(layers: Sequence[SplitLayer], hot: Sequence[int], tokens: int) -> HotSize:
    """Bytes for the first ``hot[i]`` neurons of every layer and batches of up to ``tokens`` tokens."""
    weights = sum(layer.neuron_bytes * count for layer, count in zip(layers, hot, strict=True))
    if not weights:
        return HotSize(0, 0)
    return HotSize(weights, sizes.neuron_scratch_bytes(layers[0].width, max(hot), tokens))


def experts_of(model: Model) -> list[ExpertsFFN]:
    """The experts of each layer; empty for a model without."""
    return [layer.ffn for layer in model.layers if isinstance(layer.ffn, ExpertsFFN)]


def units_size(model: Model, units: HotUnits, work: Workload) -> HotSize:
    """Bytes for ``units`` of a split file."""
    hyper, widths = model.hyper, widths_of(model.hyper)
    size = _ffn_size(model, units, work)
    weights, scratch, cache = size.weights, size.scratch, 0
    moved = [layer for layer, there in zip(model.layers, units.attention, strict=True) if there]
    if moved:
        weights += sum(attention_bytes(layer) for layer in moved)
        cache = len(moved) * sizes.cache_bytes(hyper.kv_heads, hyper.head_dim, work.context, work.kv_type)
        scratch += sizes.attention_scratch_bytes(widths, work.tokens, work.context)
        scratch += rotary_bytes(hyper, units.attention, work.context)
        if hyper.routing is not None:
            scratch += sizes.router_scratch_bytes(hyper.width, hyper.routing.experts, work.tokens)
    if units.head:
        weights += model.head.nbytes + model.output_norm.nbytes
        scratch += sizes.head_scratch_bytes(widths, work.tokens)
    return HotSize(weights, scratch, cache, size.experts)


def _ffn_size(model: Model, units: HotUnits, work: Workload) -> HotSize:
    """Bytes for neurons with their predictors, or for experts."""
    hyper = model.hyper
    if hyper.routing is not None:
        layers = experts_of(model)
        widths = expert_placement.widths_of(layers, hyper.routing.used)
        return expert_placement.hot_size(layers, units.experts, widths, work.tokens)
    assert model.split is not None
    size = hot_size(model.split.layers, units.neurons, work.tokens)
    predictors = [layer.predictor for layer in model.split.layers if units.names(layer.index)]
    if not predictors:
        return size
    weights = sum(predictor.nbytes for predictor in predictors if predictor is not None)
    scratch = sizes.predictor_scratch_bytes(hyper.width, hyper.neurons, work.tokens)
    return HotSize(size.weights + weights, size.scratch + scratch)


def widths_of(hyper: Hyperparameters) -> Widths:
    """What scratch memory depends on."""
    return Widths(hyper.width, hyper.query_width, hyper.kv_width, hyper.heads, hyper.vocabulary)


def attention_bytes(layer: LayerWeights) -> int:
    """The matrices of an attention block, and all norms and biases of its layer but those of neurons; the
    router, where there is one."""
    w = layer.attention
    matrices = (w.query, w.key, w.value, w.output)
    vectors = (w.norm, w.query_bias, w.key_bias, w.value_bias, w.output_bias, w.query_norm, w.key_norm)
    others = (w.post_norm, layer.ffn_norm, layer.ffn_down_bias, layer.ffn_post_norm)
    router = expert_placement.router_size(layer.ffn) if isinstance(layer.ffn, ExpertsFFN) else 0
    return router + sum(part.nbytes for part in (*matrices, *vectors, *others) if part is not None)


def rotary_bytes(hyper: Hyperparameters, attention: Sequence[bool], context: int) -> int:
    """Cosines and sines: once for layers that look back over a window, once for the others."""
    kinds = {local for local, there in zip(hyper.local_layers, attention, strict=True) if there}
    return len(kinds) * 4 * context * hyper.rope_dim


def fit(model: Model, planned: HotUnits, limit: int | None, work: Workload) -> HotUnits:
    """What of ``planned`` fits in ``limit`` bytes (None: all of it).

    Neurons give way first: groups are taken off the layer with the largest hot share, again and again, so
    that all layers keep similar shares; within a layer the coldest go first, since neurons are sorted. So do
    experts. Where the rest does not fit without any, the head goes, then attention blocks from the last layer
    on, until it does; what room is left then is for neurons (or experts) again.
    """
    if limit is None:
        return planned
    for units in _giving_way(planned):
        rest = units_size(model, units.without_ffns, work).total
        if rest <= limit:
            break
    if model.hyper.routing is None:
        return replace(units, neurons=_fitting_neurons(model, units, limit, work))
    layers = experts_of(model)
    widths = expert_placement.widths_of(layers, model.hyper.routing.used)
    room = limit - rest
    return replace(units, experts=expert_placement.fitting(layers, units.experts, room, widths, work.tokens))


def _giving_way(planned: HotUnits) -> Iterator[HotUnits]:
    """``planned``, then without its head, then with ever fewer attention blocks."""
    yield planned
    units = replace(planned, head=False)
    yield units
    for last in reversed([i for i, there in enumerate(planned.attention) if there]):
        units = replace(units, attention=tuple(there and i < last for i, there in enumerate(units.attention)))
        yield units


def _fitting_neurons(model: Model, planned: HotUnits, limit: int, work: Workload) -> tuple[int, ...]:
    """Hot neurons per layer beside all other units."""
    assert model.split is not None
    layers, group = model.split.layers, model.split.group
    hot = list(planned.neurons)
    while any(hot) and units_size(model, replace(planned, neurons=tuple(hot)), work).total > limit:
        shares = [count / layer.neurons for count, layer in zip(hot, layers, strict=True)]
        largest = max(range(len(hot)), key=lambda i: (shares[i], i))
        hot[largest] = max(0, (hot[largest] - 1) // group * group)
    return tuple(hot)
