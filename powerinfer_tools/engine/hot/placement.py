"""What of a model is on the hot device: what the plan says, or less where memory is short."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from operator import mul
from typing import Self

from powerinfer_tools.model import device_memory as memory
from powerinfer_tools.model.counting import Footprint
from powerinfer_tools.model.device_memory import ExpertWidths, HotSize, Widths
from powerinfer_tools.model.ffn_matrices import ExpertsFFN
from powerinfer_tools.model.footprint import footprint_of
from powerinfer_tools.model.hyperparameter_types import Hyperparameters, Rope
from powerinfer_tools.model.loading import Model

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
class HotCounts:
    """Of one layer: how many of its hottest experts are hot, and whether the shared one is."""

    experts: int
    shared: bool

    def __bool__(self) -> bool:
        return bool(self.experts) or self.shared


@dataclass(frozen=True)
class HotUnits:
    """What is on the hot device: the first ``hot`` neurons of each layer, or of its experts where ``routed``,
    and ``shared``, the expert that every token takes, of some; the attention blocks of some, which take the
    router along; the ``predictors`` of some that have neurons there; and the output norm with the head or
    not."""

    hot: tuple[int, ...]
    attention: tuple[bool, ...]
    predictors: tuple[bool, ...]
    head: bool = False
    routed: bool = False
    shared: tuple[bool, ...] = ()

    @classmethod
    def only(cls, hot: Sequence[int], *, routed: bool) -> Self:
        """So many neurons, or experts, of each layer, and nothing else."""
        none = (False,) * len(hot)
        return cls(tuple(hot), none, none, routed=routed, shared=none)

    @property
    def neurons(self) -> tuple[int, ...]:
        """Hot neurons of each layer; none of a mixture of experts."""
        return () if self.routed else self.hot

    @property
    def experts(self) -> tuple[HotCounts, ...]:
        """Hot experts of each layer of a mixture."""
        return tuple(map(HotCounts, self.hot, self.shared)) if self.routed else ()

    def names(self, layer: int) -> bool:
        """Whether the predictor of ``layer`` is there. It speaks for hot neurons first: without any, the host
        predicts for itself."""
        return self.predictors[layer] and self.hot[layer] > 0

    @property
    def without_ffns(self) -> Self:
        """The same with all neurons, or experts, on the CPU."""
        return replace(self, hot=(0,) * len(self.hot), shared=(False,) * len(self.shared))

    def __bool__(self) -> bool:
        return any(self.hot) or any(self.shared) or any(self.attention) or self.head


@dataclass(frozen=True)
class FFNSizes:
    """Bytes of the FFNs of a split file on the hot device, by layer: of ``each`` neuron, or expert, of the
    expert that every token takes and of the predictor; ``scratch`` of a layer with so many hot neurons, or
    experts, and of predictors."""

    each: tuple[int, ...]
    shared: tuple[int, ...]
    predictors: tuple[int, ...]
    scratch: Callable[[int], int]
    predictor_scratch: int
    routed: bool

    @classmethod
    def of(cls, model: Model, tokens: int) -> Self:
        """For batches of up to ``tokens`` tokens."""
        hyper, split, none = model.hyper, model.split, (0,) * model.hyper.layers
        assert split is not None
        if hyper.routing is None:
            return cls(
                each=tuple(layer.neuron_bytes for layer in split.layers),
                shared=none,
                predictors=tuple(layer.predictor.nbytes if layer.predictor else 0 for layer in split.layers),
                scratch=lambda most: memory.neuron_scratch_bytes(hyper.width, most, tokens),
                predictor_scratch=memory.predictor_scratch_bytes(hyper.width, hyper.neurons, tokens),
                routed=False,
            )
        experts = experts_of(model)
        scratch = memory.experts_scratch_bytes(ExpertWidths.of(experts, hyper.routing.used), tokens)
        return cls(
            each=tuple(layer.expert_nbytes for layer in experts),
            shared=tuple(layer.shared_nbytes for layer in experts),
            predictors=none,
            scratch=lambda most: scratch,
            predictor_scratch=0,
            routed=True,
        )

    def size(self, hot: Sequence[int], shared: Sequence[bool], predictors: Sequence[bool]) -> HotSize:
        """Of the first ``hot`` of each layer and of the experts in ``shared``; with the ``predictors`` of
        layers that have some."""
        weights = sum(map(mul, self.each, hot)) + sum(map(mul, self.shared, shared))
        if not weights:
            return HotSize(0, 0)
        named = [count > 0 and on_device for count, on_device in zip(hot, predictors, strict=True)]
        scratch = self.scratch(max(hot)) + (self.predictor_scratch if any(named) else 0)
        more = sum(map(mul, self.predictors, named))
        return HotSize(weights + more, scratch, experts=weights if self.routed else 0)


def experts_of(model: Model) -> list[ExpertsFFN]:
    """The experts of each layer; empty for a model without."""
    return [layer.feeds for layer in model.layers if isinstance(layer.feeds, ExpertsFFN)]


def units_size(model: Model, units: HotUnits, work: Workload) -> HotSize:
    """Bytes for ``units`` of a split file."""
    hyper, widths = model.hyper, widths_of(model.hyper)
    size = FFNSizes.of(model, work.tokens).size(units.hot, units.shared, units.predictors)
    weights, scratch, cache = size.weights, size.scratch, 0
    moved = [index for index, on_device in enumerate(units.attention) if on_device]
    if moved:
        mixing = [footprint_of(model).mixing[index] for index in moved]
        weights += sum(attention_bytes(model, index) for index in moved)
        cache = sum(held.nbytes(work.context, work.kv_type) for layer in mixing for held in layer.caches)
        scratch += memory.attention_scratch_bytes(widths, work.tokens, work.context)
        scratch += Footprint(ropes=set[Rope]().union(*(layer.ropes for layer in mixing))).table_bytes_of(
            work.context
        )
        if hyper.routing is not None:
            scratch += memory.router_scratch_bytes(hyper.width, hyper.routing.experts, work.tokens)
    if units.head:
        weights += model.head.nbytes + model.output_norm.nbytes
        scratch += memory.head_scratch_bytes(widths, work.tokens)
    return HotSize(weights, scratch, cache, size.experts)


def widths_of(hyper: Hyperparameters) -> Widths:
    """What scratch memory depends on."""
    return Widths(hyper.width, hyper.query_width, hyper.kv_width, hyper.heads, hyper.vocabulary)


def attention_bytes(model: Model, index: int) -> int:
    """The matrices of an attention block, and all norms and biases of its layer but those of neurons; the
    router, where there is one."""
    mixing, layer = footprint_of(model).mixing[index], model.layers[index]
    others = (layer.ffn_norm, layer.ffn_down_bias, layer.ffn_post_norm)
    router = layer.feeds.router_nbytes if isinstance(layer.feeds, ExpertsFFN) else 0
    vectors = mixing.vector_bytes + sum(part.nbytes for part in others if part is not None)
    return router + mixing.row_nbytes + vectors


def fit(model: Model, planned: HotUnits, limit: int | None, work: Workload) -> HotUnits:
    """What of ``planned`` fits in ``limit`` bytes (None: all of it).

    Neurons, or experts, give way first: groups of neurons, or single experts, are taken off the layer with
    the largest hot share, again and again, so that all layers keep similar shares; within a layer the coldest
    go first, since they are sorted. Then shared experts do, from the last layer on, which every token takes.
    Where the rest does not fit without any, the head goes, then attention blocks from the last layer on,
    until it does; what room is left then is for neurons (or experts) again.
    """
    if limit is None:
        return planned
    for units in _giving_way(planned):
        rest = units_size(model, units.without_ffns, work).total
        if rest <= limit:
            break
    return _fitting_ffns(model, units, limit - rest, work)


def _giving_way(planned: HotUnits) -> Iterator[HotUnits]:
    """``planned``, then without its head, then with ever fewer attention blocks."""
    yield planned
    units = replace(planned, head=False)
    yield units
    for last in reversed([i for i, on_device in enumerate(planned.attention) if on_device]):
        units = replace(
            units, attention=tuple(on_device and i < last for i, on_device in enumerate(units.attention))
        )
        yield units


def _fitting_ffns(model: Model, planned: HotUnits, room: int, work: Workload) -> HotUnits:
    """``planned`` with so many neurons, or experts, that they fit in ``room`` bytes."""
    assert model.split is not None
    placed, size = model.split.units, FFNSizes.of(model, work.tokens).size
    hot, shared = list(planned.hot), list(planned.shared)
    while (any(hot) or any(shared)) and size(hot, shared, planned.predictors).total > room:
        shares = [count / max(1, len(units.order)) for count, units in zip(hot, placed, strict=True)]
        largest = max(range(len(hot)), key=lambda i: (shares[i], i))
        if hot[largest]:
            group = placed[largest].group
            hot[largest] = (hot[largest] - 1) // group * group
        else:
            shared[max(i for i, on_device in enumerate(shared) if on_device)] = False
    return replace(planned, hot=tuple(hot), shared=tuple(shared))
