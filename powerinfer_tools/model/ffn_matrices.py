"""The FFNs of source models, and experts of both kinds of file: matrices, as views of the file."""

import math
from dataclasses import dataclass, replace

import numpy as np

from powerinfer_formats.split import SplitFile, SplitUnits
from powerinfer_formats.split_layout import experts_name, source_experts_name
from powerinfer_tools.model.architectures import ArchitectureSpec
from powerinfer_tools.model.hyperparameter_types import Hyperparameters
from powerinfer_tools.model.tensors import Norm, Stack, Table, Tensors, Vector, Weight


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
        """The rows whose products multiply the activation's result: up of a gated FFN."""
        return None if self.gate is None else self.up

    @property
    def matrices(self) -> tuple[Weight, ...]:
        """Gate, up and down, or up and down."""
        return (self.first, self.down) if self.factor is None else (self.first, self.factor, self.down)

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(weight.nbytes for weight in self.matrices)


@dataclass(frozen=True)
class ExpertNorms:
    """Norms of experts beside a dense FFN (Gemma 4): of what the ``router`` and the ``experts`` read of the
    residual stream, and of what the dense FFN and the experts add."""

    router: Norm
    experts: Norm
    dense_out: Norm
    experts_out: Norm

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return sum(norm.nbytes for norm in (self.router, self.experts, self.dense_out, self.experts_out))


@dataclass(frozen=True)
class ExpertsFFN:
    """The experts of one layer: ``router`` (experts, width), by the experts' numbers; the rows of all experts
    one after the other, in the order of ``units`` where there are some, in ``gate`` and ``up``
    (experts · neurons, width; no gate: act(up)) and ``down`` (experts · width, neurons). ``shared`` is the
    expert that every token takes, times the sigmoid of ``shared_gate`` (1, width), where there is one.
    ``router_bias`` (experts,) is added to scores, ``choice_bias`` to what experts are chosen by, and not to
    their weights; ``biases`` of gate, up and down (experts, rows) to each expert's products. ``beside_norm``
    normalises a layer's input for experts that read that. ``scales`` (experts,) of gate, up and down, by the
    experts' numbers, are what each matrix is times. ``norms``: where the experts have their own."""

    router: Weight
    gate: Stack | None
    up: Stack
    down: Stack
    shared: DenseFFN | None
    shared_gate: Weight | None
    units: SplitUnits | None = None
    router_bias: Vector | None = None
    choice_bias: Vector | None = None
    beside_norm: Norm | None = None
    biases: tuple[Table | None, Table | None, Table | None] = (None, None, None)
    scales: tuple[Vector | None, Vector | None, Vector | None] = (None, None, None)
    norms: ExpertNorms | None = None

    @property
    def is_scaled(self) -> bool:
        """Whether some matrix of an expert has a scale."""
        shared = () if self.shared is None else self.shared.matrices
        return any(one is not None for one in self.scales) or any(one.scale != 1.0 for one in shared)

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """Gate, where there is one, up and down of all experts."""
        return (self.up, self.down) if self.gate is None else (self.gate, self.up, self.down)

    @property
    def expert_nbytes(self) -> int:
        """Bytes of one expert that a router chooses."""
        return sum(stack.nbytes for stack in self.stacks) // self.router.rows

    @property
    def shared_nbytes(self) -> int:
        """Bytes of the expert that every token takes."""
        return 0 if self.shared is None else self.shared.nbytes

    @property
    def router_nbytes(self) -> int:
        """Bytes of the router, including the gate of the shared expert."""
        return self.router.nbytes + (0 if self.shared_gate is None else self.shared_gate.nbytes)

    def expert(self, index: int) -> DenseFFN:
        """The expert of that number, as views."""
        count = self.router.rows
        position = index if self.units is None else self.units.positions[index]
        *gate, up, down = (
            replace(matrix, scale=1.0 if scale is None else float(scale[index]))
            for matrix, scale in zip(
                (stack.matrix(f"expert {index}", position, count) for stack in self.stacks),
                self.scales[3 - len(self.stacks) :],
                strict=True,
            )
        )
        return DenseFFN(gate[0] if gate else None, up, down)


def read_ffn(
    tensors: Tensors, spec: ArchitectureSpec, hyper: Hyperparameters, index: int, split: SplitFile | None
) -> DenseFFN | ExpertsFFN:
    """The FFN of layer ``index`` of a source model, or its experts, which may be those of a split file.

    Raises FormatError for tensors that are missing or of another shape or type, ModelError for those of
    another family.
    """
    if hyper.facts[index].ffn == "dense":
        return _dense_ffn(tensors, spec, hyper, f"blk.{index}", hyper.facts[index].neurons)
    assert hyper.routing is not None
    prefix, routing, width = f"blk.{index}", hyper.routing, hyper.width
    experts, neurons, shared = routing.experts, hyper.neurons, routing.shared_neurons
    name = source_experts_name if split is None else experts_name
    names = (name(index, "gate"), name(index, "up"))
    gate, up = _gate_and_up(tensors, spec, names, (experts, neurons, width))
    optional = tensors.optional if spec.gated_biases else tensors.absent
    if spec.spare_dense:
        for kind in ("gate", "up", "down"):
            tensors.leave_out(f"{prefix}.ffn_{kind}.weight")
    return ExpertsFFN(
        router=tensors.matrix(f"{prefix}.ffn_gate_inp.weight", experts, width),
        gate=gate,
        up=up,
        down=tensors.stack(name(index, "down"), experts, width, neurons),
        shared=_shared_expert(tensors, spec, prefix, shared, width) if shared else None,
        shared_gate=tensors.row(f"{prefix}.ffn_gate_inp_shexp.weight", width)
        if shared and tensors.has(f"{prefix}.ffn_gate_inp_shexp.weight")
        else None,
        units=None if split is None else split.units[index],
        router_bias=optional(f"{prefix}.ffn_gate_inp.bias", experts),
        choice_bias=_choice_bias(tensors, prefix, experts),
        beside_norm=tensors.norm(spec, f"{prefix}.{spec.beside_norm}", width) if spec.beside_norm else None,
        biases=_expert_biases(tensors, spec, prefix, experts, (neurons, neurons, width)),
        scales=_expert_scales(tensors, spec, prefix, (*names, name(index, "down")), experts),
        norms=_expert_norms(tensors, prefix, width) if spec.expert_norms else None,
    )


def _expert_norms(tensors: Tensors, prefix: str, width: int) -> ExpertNorms:
    """What the router reads is also divided by the root of the width."""
    router = tensors.vector(f"{prefix}.ffn_gate_inp.scale", width) / np.float32(math.sqrt(width))
    return ExpertNorms(
        router=Norm("rms", router),
        experts=Norm("rms", tensors.vector(f"{prefix}.pre_ffw_norm_2.weight", width)),
        dense_out=Norm("rms", tensors.vector(f"{prefix}.post_ffw_norm_1.weight", width)),
        experts_out=Norm("rms", tensors.vector(f"{prefix}.post_ffw_norm_2.weight", width)),
    )


def _choice_bias(tensors: Tensors, prefix: str, experts: int) -> Vector | None:
    """One converter leaves out the end of the name."""
    name = f"{prefix}.exp_probs_b"
    return tensors.optional(name if tensors.has(name) else f"{name}.bias", experts)


def _expert_biases(
    tensors: Tensors, spec: ArchitectureSpec, prefix: str, experts: int, rows: tuple[int, int, int]
) -> tuple[Table | None, Table | None, Table | None]:
    names = [f"{prefix}.ffn_{kind}_exps.bias" for kind in ("gate", "up", "down")]
    gate, up, down = (
        tensors.table(name, (experts, size)) if spec.gated_biases and tensors.has(name) else None
        for name, size in zip(names, rows, strict=True)
    )
    return gate, up, down


def _expert_scales(
    tensors: Tensors, spec: ArchitectureSpec, prefix: str, names: tuple[str, str, str], experts: int
) -> tuple[Vector | None, Vector | None, Vector | None]:
    """Of gate, up and down; a split file has them by the source's names, whatever the order of the rows. In
    families whose experts have their own norms, down has one whatever its type."""
    gate, up, down = (
        tensors.scales(name, experts, f"{prefix}.ffn_{kind}_exps") if tensors.has(name) else None
        for kind, name in zip(("gate", "up", "down"), names, strict=True)
    )
    if spec.expert_norms:
        down = tensors.optional(f"{prefix}.ffn_down_exps.scale", experts)
    return gate, up, down


def _gate_and_up(
    tensors: Tensors, spec: ArchitectureSpec, names: tuple[str, str], sizes: tuple[int, int, int]
) -> tuple[Stack | None, Stack]:
    """Of all experts; some files have the rows of both in one tensor, those of gate first."""
    experts, neurons, width = sizes
    together = names[1].replace("up", "gate_up")
    if tensors.has(together):
        both = tensors.stack(together, experts, 2 * neurons, width)
        return both.halves(experts)
    gate = tensors.stack(names[0], experts, neurons, width) if spec.gated else None
    return gate, tensors.stack(names[1], experts, neurons, width)


def _shared_expert(
    tensors: Tensors, spec: ArchitectureSpec, prefix: str, neurons: int, width: int
) -> DenseFFN:
    end = "_shexp" if spec.dense_beside == "none" else ""
    return DenseFFN(
        tensors.matrix(f"{prefix}.ffn_gate{end}.weight", neurons, width) if spec.gated else None,
        tensors.matrix(f"{prefix}.ffn_up{end}.weight", neurons, width),
        tensors.matrix(f"{prefix}.ffn_down{end}.weight", width, neurons),
    )


def _dense_ffn(
    tensors: Tensors, spec: ArchitectureSpec, hyper: Hyperparameters, prefix: str, neurons: int
) -> DenseFFN:
    gate = f"{prefix}.ffn_gate.weight"
    if spec.fused_gate:
        fused = tensors.matrix(f"{prefix}.ffn_up.weight", 2 * neurons, hyper.width)
        return DenseFFN(
            gate=fused.part("gate", 0, neurons),
            up=fused.part("up", neurons, neurons),
            down=tensors.matrix(f"{prefix}.ffn_down.weight", hyper.width, neurons),
        )
    if not spec.gated:
        tensors.absent(gate, neurons)
    return DenseFFN(
        gate=tensors.matrix(gate, neurons, hyper.width) if spec.gated else None,
        up=tensors.matrix(f"{prefix}.{spec.ffn_names[0]}.weight", neurons, hyper.width),
        down=tensors.matrix(f"{prefix}.{spec.ffn_names[1]}.weight", hyper.width, neurons),
    )
