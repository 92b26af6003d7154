"""The part of a model on the hot device: as in the plan, or less if memory is short."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from operator import mul
from typing import Self

from powerinfer_formats.split import SplitLayer
from powerinfer_tools.model import device_memory as memory
from powerinfer_tools.model.counting import Footprint
from powerinfer_tools.model.device_memory import ExpertWidths, HotSize, Widths
from powerinfer_tools.model.ffn_matrices import DenseFFN, ExpertsFFN
from powerinfer_tools.model.footprint import footprint_of
from powerinfer_tools.model.hyperparameter_types import Hyperparameters, Rope
from powerinfer_tools.model.loading import Model

#: The experts of a layer, or its dense FFN, which counts as one expert.
Experts = ExpertsFFN | DenseFFN
#: Each piece starts at a multiple of so many bytes in the device's memory.
ALIGNMENT = 256


@dataclass(frozen=True)
class Workload:
    """The work that memory is needed for: batches of up to ``tokens``, ``context`` positions in a cache of
    ``kv_type``; ``predicted`` layers are computed in this mode; with ``check_recall`` the hits of their
    predictors are counted."""

    tokens: int
    context: int
    kv_type: str = "f16"
    predicted: frozenset[int] = frozenset()
    check_recall: bool = False


@dataclass(frozen=True)
class HotCounts:
    """The number of hot experts of one layer (its hottest ones), and whether its shared expert is hot."""

    experts: int
    shared: bool

    def __bool__(self) -> bool:
        return bool(self.experts) or self.shared


@dataclass(frozen=True)
class HotUnits:
    """What is on the hot device: the first ``hot`` units of each layer, which ``are_neurons`` of an FFN
    that is sorted, or experts (another FFN is one); ``shared``, the expert that every token takes, of some;
    the attention blocks of some, which take the router along; the ``predictors`` of some that have neurons
    there; and the output norm with the head or not."""

    hot: tuple[int, ...]
    attention: tuple[bool, ...]
    predictors: tuple[bool, ...]
    head: bool
    are_neurons: tuple[bool, ...]
    shared: tuple[bool, ...]

    @classmethod
    def only(cls, hot: Sequence[int], *, routed: bool) -> Self:
        """The first ``hot`` neurons (with ``routed``: experts) of each layer, and nothing else."""
        none = (False,) * len(hot)
        return cls(tuple(hot), none, none, False, (not routed,) * len(hot), none)

    @property
    def neurons(self) -> tuple[int, ...]:
        """Hot neurons of each layer; 0 where its units are experts."""
        return tuple(map(mul, self.hot, self.are_neurons))

    @property
    def experts(self) -> tuple[HotCounts, ...]:
        """Hot experts of each layer; none where its units are neurons."""
        units = zip(self.hot, self.shared, self.are_neurons, strict=True)
        return tuple(HotCounts(0 if neurons else hot, shared) for hot, shared, neurons in units)

    def names(self, layer: int) -> bool:
        """Whether the predictor of ``layer`` is on the device. Its purpose is to predict hot neurons: if
        there are none, the host predicts for itself."""
        return self.predictors[layer] and self.hot[layer] > 0

    @property
    def without_ffns(self) -> Self:
        """The same with all neurons, or experts, on the CPU."""
        return replace(self, hot=(0,) * len(self.hot), shared=(False,) * len(self.shared))

    def __bool__(self) -> bool:
        return any(self.hot) or any(self.shared) or any(self.attention) or self.head


@dataclass(frozen=True)
class FFNSizes:
    """Bytes of the FFNs of a split file on the hot device, by layer: of ``each`` unit, of the expert that
    every token takes and of the predictor. ``are_neurons``: what units are, as in :class:`HotUnits`;
    ``routed``: whether a router chooses among them. ``neuron_scratch`` of a layer with so many hot neurons;
    scratch of experts and of predictors."""

    each: tuple[int, ...]
    shared: tuple[int, ...]
    predictors: tuple[int, ...]
    are_neurons: tuple[bool, ...]
    routed: tuple[bool, ...]
    neuron_scratch: Callable[[int], int]
    experts_scratch: int
    predictor_scratch: int

    @classmethod
    def of(cls, model: Model, tokens: int) -> Self:
        """For batches of up to ``tokens`` tokens."""
        hyper, ffns = model.hyper, [layer.feeds for layer in model.layers]
        experts = [ffn for ffn in ffns if ffn is not None and not isinstance(ffn, SplitLayer)]
        return cls(
            each=tuple(map(_unit_bytes, ffns)),
            shared=tuple(ffn.shared_nbytes if isinstance(ffn, ExpertsFFN) else 0 for ffn in ffns),
            predictors=tuple(
                ffn.predictor.nbytes if isinstance(ffn, SplitLayer) and ffn.predictor else 0 for ffn in ffns
            ),
            are_neurons=tuple(isinstance(ffn, SplitLayer) for ffn in ffns),
            routed=tuple(isinstance(ffn, ExpertsFFN) for ffn in ffns),
            neuron_scratch=lambda most: memory.neuron_scratch_bytes(hyper.width, most, tokens),
            experts_scratch=0
            if hyper.routing is None
            else memory.experts_scratch_bytes(ExpertWidths.of(experts, hyper.routing.used), tokens),
            predictor_scratch=memory.predictor_scratch_bytes(hyper.width, hyper.neurons, tokens),
        )

    def size(self, hot: Sequence[int], shared: Sequence[bool], predictors: Sequence[bool]) -> HotSize:
        """Of the first ``hot`` of each layer and of the experts in ``shared``; with the ``predictors`` of
        layers that have some."""
        nbytes = [
            count * each + shared_hot * one
            for count, each, shared_hot, one in zip(hot, self.each, shared, self.shared, strict=True)
        ]
        if not any(nbytes):
            return HotSize(0, 0)
        named = [count > 0 and on_device for count, on_device in zip(hot, predictors, strict=True)]
        scratch = self.predictor_scratch if any(named) else 0
        if neurons := max(map(mul, hot, self.are_neurons)):
            scratch += self.neuron_scratch(neurons)
        if any(size and not neurons for size, neurons in zip(nbytes, self.are_neurons, strict=True)):
            scratch += self.experts_scratch
        more = sum(map(mul, self.predictors, named))
        return HotSize(sum(nbytes) + more, scratch, experts=sum(map(mul, nbytes, self.routed)))


def experts_of(model: Model) -> list[Experts | None]:
    """The experts of each layer; None where its units are neurons, or there is no FFN."""
    ffns = (layer.feeds for layer in model.layers)
    return [None if isinstance(ffn, SplitLayer) else ffn for ffn in ffns]


def _unit_bytes(ffn: SplitLayer | Experts | None) -> int:
    """Bytes of a neuron, or of an expert that a router chooses, or of an FFN that is one; none without."""
    if ffn is None:
        return 0
    if isinstance(ffn, SplitLayer):
        return ffn.neuron_bytes
    return ffn.expert_nbytes if isinstance(ffn, ExpertsFFN) else ffn.nbytes


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
    """The sizes that scratch memory depends on."""
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
    """The part of ``planned`` that fits in ``limit`` bytes (None: all of it).

    Neurons, or experts, give way first: groups of neurons, or single experts, are repeatedly removed from the
    layer with the largest hot share, so that all layers keep similar shares. Within a layer the coldest are
    removed first, since they are sorted. Then the shared experts, which every token takes, are removed, from
    the last layer on. If the rest does not fit even without experts and neurons, the head is removed, then
    attention blocks from the last layer on, until it fits; the remaining room is then used for neurons (or
    experts) again.
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
