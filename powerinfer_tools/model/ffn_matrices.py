"""The FFNs of source models, and experts of both kinds of file: matrices, as views of the file."""

from dataclasses import dataclass
from functools import cached_property

from powerinfer_formats.split_experts import SplitExperts, experts_name, source_name
from powerinfer_tools.model.architectures import ArchitectureSpec
from powerinfer_tools.model.hyperparameters import Hyperparameters
from powerinfer_tools.model.tensors import Stack, Tensors, Weight


@dataclass(frozen=True)
class DenseFFN:
    """The FFN of a source model: gate (None: not gated) and up (neurons, width), down (width, neurons), or
    ``transposed`` (neurons, width)."""

    gate: Weight | None
    up: Weight
    down: Weight
    transposed: bool = False

    @property
    def first(self) -> Weight:
        """The rows whose products the activation reads: gate, or up of an FFN without gate."""
        return self.up if self.gate is None else self.gate

    @property
    def factor(self) -> Weight | None:
        """The rows whose products the activation's result is multiplied with: up of a gated FFN."""
        return None if self.gate is None else self.up

    @property
    def matrices(self) -> tuple[Weight, ...]:
        """All that there are: gate, up and down, or up and down."""
        return (self.first, self.down) if self.factor is None else (self.first, self.factor, self.down)


@dataclass(frozen=True)
class ExpertPlaces:
    """Experts of a layer of a split file: ``order`` has the expert at each position, hottest first; by the
    plan, the first ``hot`` of them are on the hot device, and with ``shared_hot`` the one that every token
    takes."""

    order: tuple[int, ...]
    hot: int
    shared_hot: bool

    @cached_property
    def positions(self) -> dict[int, int]:
        """Where each expert is."""
        return {expert: position for position, expert in enumerate(self.order)}


@dataclass(frozen=True)
class ExpertsFFN:
    """The experts of one layer: ``router`` (experts, width), by the experts' numbers; the rows of all experts
    one after the other, in the order of ``places`` where there are some, in ``gate`` and ``up``
    (experts · neurons, width) and ``down`` (experts · width, neurons). ``shared`` is the expert that every
    token takes, times the sigmoid of ``shared_gate`` (1, width)."""

    router: Weight
    gate: Stack
    up: Stack
    down: Stack
    shared: DenseFFN | None
    shared_gate: Weight | None
    places: ExpertPlaces | None = None

    @property
    def stacks(self) -> tuple[Stack, Stack, Stack]:
        """Gate, up and down of all experts."""
        return self.gate, self.up, self.down

    def expert(self, index: int) -> DenseFFN:
        """The expert of that number, as views."""
        count = self.router.rows
        position = index if self.places is None else self.places.positions[index]
        gate, up, down = (stack.matrix(f"expert {index}", position, count) for stack in self.stacks)
        return DenseFFN(gate, up, down)


def read_ffn(
    tensors: Tensors, spec: ArchitectureSpec, hyper: Hyperparameters, index: int, split: SplitExperts | None
) -> DenseFFN | ExpertsFFN:
    """The FFN of layer ``index`` of a source model, or its experts, which may be those of a split file.

    Raises FormatError for tensors that are missing or of another shape or type, ModelError for those of
    another family.
    """
    if hyper.routing is None:
        return _dense_ffn(tensors, spec, hyper, f"blk.{index}")
    prefix, routing, width = f"blk.{index}", hyper.routing, hyper.width
    experts, neurons, shared = routing.experts, hyper.neurons, routing.shared_neurons
    name = source_name if split is None else experts_name
    return ExpertsFFN(
        router=tensors.matrix(f"{prefix}.ffn_gate_inp.weight", experts, width),
        gate=tensors.stack(name(index, "gate"), experts, neurons, width),
        up=tensors.stack(name(index, "up"), experts, neurons, width),
        down=tensors.stack(name(index, "down"), experts, width, neurons),
        shared=_shared_expert(tensors, prefix, shared, width) if shared else None,
        shared_gate=tensors.row(f"{prefix}.ffn_gate_inp_shexp.weight", width) if shared else None,
        places=None if split is None else _places(split, index),
    )


def _shared_expert(tensors: Tensors, prefix: str, neurons: int, width: int) -> DenseFFN:
    return DenseFFN(
        tensors.matrix(f"{prefix}.ffn_gate_shexp.weight", neurons, width),
        tensors.matrix(f"{prefix}.ffn_up_shexp.weight", neurons, width),
        tensors.matrix(f"{prefix}.ffn_down_shexp.weight", width, neurons),
    )


def _places(split: SplitExperts, index: int) -> ExpertPlaces:
    order = tuple(split.orders[index].tolist())
    return ExpertPlaces(order, split.header.hot[index], split.is_hot_shared(index))


def _dense_ffn(tensors: Tensors, spec: ArchitectureSpec, hyper: Hyperparameters, prefix: str) -> DenseFFN:
    gate = f"{prefix}.ffn_gate.weight"
    if spec.fused_gate:
        fused = tensors.matrix(f"{prefix}.ffn_up.weight", 2 * hyper.neurons, hyper.width)
        return DenseFFN(
            gate=fused.part("gate", 0, hyper.neurons),
            up=fused.part("up", hyper.neurons, hyper.neurons),
            down=tensors.matrix(f"{prefix}.ffn_down.weight", hyper.width, hyper.neurons),
        )
    if not spec.gated:
        tensors.absent(gate, hyper.neurons)
    return DenseFFN(
        gate=tensors.matrix(gate, hyper.neurons, hyper.width) if spec.gated else None,
        up=tensors.matrix(f"{prefix}.ffn_up.weight", hyper.neurons, hyper.width),
        down=tensors.matrix(f"{prefix}.ffn_down.weight", hyper.width, hyper.neurons),
    )
