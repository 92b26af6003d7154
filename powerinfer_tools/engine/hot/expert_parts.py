"""The experts of a split file, and their routers, put on a device."""

from collections.abc import Sequence
from functools import cached_property

import torch

from powerinfer_kernels.triton_layout import PLANAR_TYPES
from powerinfer_tools.engine.hot.devices import Device
from powerinfer_tools.engine.hot.experts import (
    Dispatch,
    ExpertScratch,
    ExpertStack,
    HotExpert,
    HotExperts,
    HotRouter,
    RouterScores,
    WholeFFN,
)
from powerinfer_tools.engine.hot.hot_ffn import FusedRows, Inputs, PartRows
from powerinfer_tools.engine.hot.loading import Form
from powerinfer_tools.engine.hot.placement import Experts, HotCounts, HotUnits
from powerinfer_tools.engine.hot.products import Product
from powerinfer_tools.engine.hot.routes import SHARED
from powerinfer_tools.model.device_memory import ExpertWidths, experts_scratch_floats, input_matrices
from powerinfer_tools.model.ffn_matrices import DenseFFN, ExpertsFFN
from powerinfer_tools.model.hyperparameter_types import Hyperparameters
from powerinfer_tools.model.tensors import Stack, Weight

Tensor = torch.Tensor


class ExpertParts:
    """The experts of ``layers`` that ``units`` place on the device (None: the layer's units are neurons), and
    the memory that they share; each piece is taken from the form's memory once. ``chunk``: flat space for
    unpacked rows."""

    def __init__(
        self,
        layers: Sequence[Experts | None],
        hyper: Hyperparameters,
        units: HotUnits,
        tokens: int,
        form: Form,
        device: Device,
        chunk: Tensor,
    ) -> None:
        assert hyper.routing is not None
        self._layers, self._hyper, self._units, self._tokens = layers, hyper, units, tokens
        self._form, self._device, self._chunk, self._memory = form, device, chunk, form.memory
        self._routing = hyper.routing
        self._widths = widths_of(layers, hyper.routing.used)

    def take_all(self) -> None:
        """Take the memory of everything, in a fixed order."""
        _ = self.experts, self.dispatch, self.routers

    @cached_property
    def experts(self) -> list[HotExperts | WholeFFN | None]:
        """The hot experts of each layer that has some, or whose attention and router are here."""
        units = zip(self._layers, self._units.experts, self._units.attention, strict=True)
        return [self._of_layer(layer, counts, routes=on_device) for layer, counts, on_device in units]

    @cached_property
    def dispatch(self) -> Dispatch | None:
        """The memory that all hot experts share."""
        if not any(self._units.experts):
            return None
        width, neurons, count = self._hyper.width, self._widths.neurons, self._tokens
        kinds = [self._memory.floats(count, width) for _ in range(self._widths.inputs)]
        # A single token's hidden values are those of all its experts.
        gate, up = (self._memory.floats(most * neurons) for most in (max(count, self._widths.taken), count))
        scratch = ExpertScratch(self._chunk, Inputs(kinds[0], kinds[-1]), gate, up)
        shape = (2, count * self._widths.taken)
        host, device = self._staging(*shape), self._memory.floats(*shape)
        if not self._memory.counting:
            # While a graph is recorded, the buffer holds routes to no expert.
            host[0].zero_()
            host[1].view(torch.int32).fill_(-1)
            device.copy_(host)
        return Dispatch(host, self._form.window(self._device, host), device, scratch, self._widths.taken)

    @cached_property
    def routers(self) -> list[HotRouter | None]:
        """The routers of layers whose attention is here."""
        if not any(self._units.attention):
            return [None] * len(self._layers)
        shapes = ((self._tokens, self._routing.experts), (self._tokens, 1))
        here = RouterScores(*(self._memory.floats(*shape) for shape in shapes))
        host = RouterScores(*(self._staging(*shape) for shape in shapes))
        reached = [self._form.window(self._device, end) for end in (host.experts, host.shared)]
        windows = None if None in reached else RouterScores(*(end for end in reached if end is not None))
        return [
            HotRouter(
                self._form.product(layer.router),
                None if layer.shared_gate is None else self._form.product(layer.shared_gate),
                here,
                host,
                windows,
                self._chunk,
            )
            if on_device and isinstance(layer, ExpertsFFN)
            else None
            for layer, on_device in zip(self._layers, self._units.attention, strict=True)
        ]

    def cold(self, index: int) -> bool:
        """Whether the host computes some experts of layer ``index``."""
        layer = self._layers[index]
        every = HotCounts(1, shared=False)
        if isinstance(layer, ExpertsFFN):
            every = HotCounts(layer.router.rows, layer.shared is not None)
        return self._units.experts[index] != every

    def float_rows(self, *, on_device: bool) -> set[bool]:
        """Whether the readers of the FFN's input are of float types, in layers whose attention is on the
        device (or is not). Both answers if some readers are and some are not; none if there are no
        readers."""
        kinds = set()
        for layer, counts, moved in zip(
            self._layers, self._units.experts, self._units.attention, strict=True
        ):
            if layer is None or moved != on_device:
                continue
            routed = isinstance(layer, ExpertsFFN)
            if counts or (moved and routed):
                kinds |= {weight.row_type.is_float for weight in input_matrices(layer)}
            if moved and isinstance(layer, ExpertsFFN):
                kinds |= {weight.row_type.is_float for weight in routers_of(layer)}
        return kinds

    def _of_layer(
        self, layer: Experts | None, counts: HotCounts, *, routes: bool
    ) -> HotExperts | WholeFFN | None:
        """The hot experts of a layer, or None. With ``routes`` (its router is here), the set may be empty."""
        if isinstance(layer, ExpertsFFN):
            return self._routed(layer, counts) if counts or routes else None
        if layer is None or not counts:
            return None
        assert self.dispatch is not None
        return WholeFFN(self._expert(layer), self.dispatch.scratch)

    def _routed(self, layer: ExpertsFFN, counts: HotCounts) -> HotExperts:
        """The hot experts of a layer with a router. If fused kernels read the routed experts, these are one
        matrix of each kind."""
        hot, kinds = chosen(layer, counts), [stack.row_type for stack in layer.stacks]
        shared = {SHARED: self._expert(hot.pop(SHARED))} if SHARED in hot else {}
        fused = self._form.fused and len(kinds) == 3 and all(kind in PLANAR_TYPES for kind in kinds)
        if not (fused and hot):
            return HotExperts(shared | {number: self._expert(ffn) for number, ffn in hot.items()})
        products = [self._form.product(_first(stack, layer, len(hot))) for stack in layer.stacks]
        wholes = [product.rows for product in products]
        gate, up, down = (whole for whole in wholes if isinstance(whole, FusedRows))
        experts = {}
        for place, number in enumerate(hot):
            parts = [
                Product(
                    PartRows(whole, place * (product.count // len(hot))),
                    product.count // len(hot),
                    product.columns,
                )
                for whole, product in zip((gate, up, down), products, strict=True)
            ]
            experts[number] = HotExpert(parts[0], parts[1], parts[2], self._activation)
        places = {number: place for place, number in enumerate(hot)}
        neurons = products[0].count // len(hot)
        stack = ExpertStack(gate.planar, up.planar, down.planar, neurons, places, self._activation)
        return HotExperts(shared | experts, stack)

    @property
    def _activation(self) -> tuple[str, float]:
        return self._hyper.activation, self._hyper.activation_cut

    def _expert(self, ffn: DenseFFN) -> HotExpert:
        gate, *up, down = (self._form.product(weight) for weight in ffn.matrices)
        return HotExpert(gate, up[0] if up else None, down, self._activation)

    def _staging(self, *shape: int) -> Tensor:
        return self._device.staging(0, *shape[1:]) if self._memory.counting else self._device.staging(*shape)


def widths_of(layers: Sequence[Experts | None], used: int) -> ExpertWidths:
    """The sizes that scratch depends on, where tokens take ``used`` experts of a layer."""
    return ExpertWidths.of([layer for layer in layers if layer is not None], used)


def chosen(layer: Experts | None, counts: HotCounts) -> dict[int, DenseFFN]:
    """The hot experts of a layer, by number."""
    if not isinstance(layer, ExpertsFFN):
        return {} if layer is None or not counts else {SHARED: layer}
    assert layer.units is not None
    experts = {expert: layer.expert(expert) for expert in layer.units.order[: counts.experts].tolist()}
    if counts.shared:
        assert layer.shared is not None
        experts[SHARED] = layer.shared
    return experts


def _first(stack: Stack, layer: ExpertsFFN, count: int) -> Weight:
    """The matrices of the first ``count`` experts of a split file, as one."""
    (whole,) = stack.weights
    return whole.part(f"{count} experts", 0, stack.rows // layer.router.rows * count)


def routers_of(layer: Experts | None) -> list[Weight]:
    """The router, if the layer has one, and the gate of the shared expert, if there is one."""
    if not isinstance(layer, ExpertsFFN):
        return []
    return [layer.router] if layer.shared_gate is None else [layer.router, layer.shared_gate]


def chunk_floats(layers: Sequence[Experts | None], used: int) -> int:
    """Flat space that unpacked rows of experts need."""
    return experts_scratch_floats(widths_of(layers, used), 1)["chunk"]
