"""Sizes of a model, as far as placing it needs them: matrices by row type, layers, heads, vocabulary.

A shape comes from a loaded model or from a name in :mod:`powerinfer_tools.model.published`; nothing else
in the planner knows where it came from. Sizes are in values unless a name says bytes.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from powerinfer_formats.block_types import BLOCK_SHAPES, TensorType
from powerinfer_kernels import Layout, packed_row_bytes
from powerinfer_tools.errors import PlanError
from powerinfer_tools.model.architectures import RELU_FAMILY
from powerinfer_tools.model.matrices import FLOAT_TYPES, MatrixShape

if TYPE_CHECKING:
    from powerinfer_tools.model.ffn_matrices import DenseFFN
    from powerinfer_tools.model.footprint import ModelFootprint
    from powerinfer_tools.model.loading import Model
    from powerinfer_tools.model.tensors import Weight


@dataclass(frozen=True)
class ExpertsShape:
    """The experts of one layer: ``count`` of the same shape, of which a token takes ``used``. ``router``: the
    matrices that choose and weigh them, read for every token; empty for the FFN of a layer beside such with
    experts, which is one that every token takes. ``shared``: gate, up and down of the expert that every token
    takes; empty without one. ``scaled``: matrices have scales of their own."""

    count: int
    used: int
    router: tuple[MatrixShape, ...]
    shared: tuple[MatrixShape, ...] = ()
    scaled: bool = False

    @property
    def shared_neurons(self) -> int:
        """Neurons of the shared expert; 0 without one."""
        return self.shared[0].rows if self.shared else 0


@dataclass(frozen=True)
class LayerShape:
    """One layer. ``gate`` is None for an FFN of two matrices; ``vector_bytes`` counts norms and biases;
    ``window`` is how many positions attention looks back, 0 for all of them; ``down_transposed``: the file
    has the down projection with a row for each neuron. With ``experts``, gate, up and down are those of
    one; without FFN, they have no rows. ``top_alone``: its gate keeps the largest alone, which makes zeros,
    and depends on all neurons, so that they are computed together, on the CPU."""

    attention: tuple[MatrixShape, ...]
    gate: MatrixShape | None
    up: MatrixShape
    down: MatrixShape
    vector_bytes: int
    window: int = 0
    down_transposed: bool = False
    experts: ExpertsShape | None = None
    top_alone: bool = False

    @property
    def routed(self) -> bool:
        """Whether a router chooses among experts."""
        return self.experts is not None and bool(self.experts.router)

    @property
    def ffn(self) -> tuple[MatrixShape, ...]:
        """The matrices of the FFN, or of one expert."""
        return (self.up, self.down) if self.gate is None else (self.gate, self.up, self.down)

    @property
    def matrices(self) -> tuple[MatrixShape, ...]:
        """All matrices of the layer."""
        if self.experts is None:
            return (*self.attention, *self.ffn)
        experts = self.experts
        return (*self.attention, *experts.router, *experts.shared, *(self.ffn * experts.count))

    @property
    def neurons(self) -> int:
        """Number of FFN neurons; with experts, those of all that a router chooses from."""
        return self.up.rows * (self.experts.count if self.experts else 1)

    @property
    def counted(self) -> int:
        """How many units a profile counts: neurons, or experts; one that never is active where there is no
        FFN."""
        return self.experts.count if self.experts else self.up.rows or 1

    @property
    def width(self) -> int:
        """Width of the residual stream."""
        return self.up.columns


@dataclass(frozen=True)
class PublishedSparsity:
    """What is published about a model's activations: ``density`` is the mean active share of neurons, and the
    busiest ``hot_share`` of the neurons make ``hot_activations`` of all activations; predictors name
    ``overshoot`` times as many neurons as are active."""

    density: float
    hot_share: float
    hot_activations: float
    source: str
    overshoot: float


@dataclass(frozen=True)
class ModelShape:
    """Sizes of one model; ``rope_dim`` is 0 without rotary positions; ``parallel``: attention and FFN read
    the same stream; ``fingerprint`` is None when no file is at hand; ``tied``: the head is the embedding;
    ``attention_limit``: why attention stays on the CPU, ``placement_limit``: why all does; ``counted``: what
    going through the blocks of a model at hand has counted."""

    name: str
    architecture: str
    activation: str
    heads: int
    kv_heads: int
    head_dim: int
    trained_context: int
    layers: tuple[LayerShape, ...]
    embedding: MatrixShape
    head: MatrixShape
    rope_dim: int = 0
    position_bytes: int = 0
    fingerprint: str | None = None
    sparsity: PublishedSparsity | None = None
    tied: bool = False
    attention_limit: str | None = None
    placement_limit: str | None = None
    parallel: bool = False
    counted: "ModelFootprint | None" = field(default=None, compare=False, repr=False)

    @property
    def width(self) -> int:
        """Width of the residual stream."""
        return self.embedding.columns

    @property
    def vocabulary(self) -> int:
        """Number of tokens."""
        return self.embedding.rows

    @property
    def exact_zeros(self) -> bool:
        """Whether inactive neurons contribute exactly nothing, so that skipping them is exact."""
        return self.activation in RELU_FAMILY

    def has_zeros(self, layer: int) -> bool:
        """Whether inactive neurons of ``layer`` contribute exactly nothing."""
        return self.layers[layer].neurons > 0 and (self.exact_zeros or self.layers[layer].top_alone)

    @property
    def picks_in_experts(self) -> bool:
        """Whether the CPU can leave out single neurons of experts, in every layer that has experts."""
        down = [layer.down for layer in self.expert_layers]
        return (
            bool(down)
            and self.exact_zeros
            and not any(layer.experts and layer.experts.scaled for layer in self.expert_layers)
            and all(Layout.PICKED_COLUMNS.possible(one.row_type, one.rows) for one in down)
        )

    @property
    def expert_layers(self) -> tuple[LayerShape, ...]:
        """The layers that have a router."""
        return tuple(layer for layer in self.layers if layer.routed)

    @property
    def ffn_layers(self) -> tuple[LayerShape, ...]:
        """The layers whose FFN is placed in groups of its neurons."""
        return tuple(layer for layer in self.layers if layer.experts is None and layer.neurons)

    @property
    def routed(self) -> bool:
        """Whether some layer has experts."""
        return bool(self.expert_layers)

    @property
    def most_neurons(self) -> int:
        """Of an FFN that is placed in groups of its neurons; 0 where none is."""
        return max((layer.neurons for layer in self.ffn_layers), default=0)

    @property
    def total_neurons(self) -> int:
        """FFN neurons of all layers."""
        return sum(layer.neurons for layer in self.layers)

    @property
    def weights(self) -> int:
        """Weights of all matrices, a tied head not counted twice."""
        tables = (self.embedding,) if self.tied else (self.embedding, self.head)
        matrices = [*tables, *(matrix for layer in self.layers for matrix in layer.matrices)]
        return sum(matrix.rows * matrix.columns for matrix in matrices)


@dataclass(frozen=True)
class NeuronBytes:
    """Bytes of one neuron of a layer in memory, the same on both sides. ``always`` is read for every token
    even when inactive neurons are skipped (the gate row, or the up row of an FFN without gate); ``down`` the
    down row. ``types`` names the row types, in the order gate, up, down."""

    total: int
    always: int
    down: int
    types: tuple[str, ...]

    @property
    def skippable(self) -> int:
        """Bytes that are read only when the neuron is active."""
        return self.total - self.always


def stored_down_type(
    source: TensorType, requested: TensorType | None = None, *, transposed: bool = False
) -> TensorType:
    """Row type of the transposed down projection in the split file.

    Transposing breaks quantised blocks apart, so quantised sources are requantised: to Q8_0 unless another
    type is requested. Float sources keep their type, and so do rows that are ``transposed`` already, of types
    that convert writes.
    """
    if requested is not None:
        return requested
    kept = source in FLOAT_TYPES or (transposed and source in (TensorType.Q8_0, TensorType.Q4_0))
    return source if kept else TensorType.Q8_0


def neuron_bytes(layer: LayerShape, down_type: TensorType | None = None) -> NeuronBytes:
    """Bytes in memory of one neuron of ``layer``: its gate, up and (transposed) down rows. The padding of
    cold records in the split file does not count: the engine drops it when it loads them.

    With experts, which keep the source's matrices, an equal part of an expert's bytes. Raises PlanError when
    the width does not hold whole blocks of the down projection's row type.
    """
    if layer.experts is not None:
        nbytes = -(-sum(matrix.nbytes for matrix in layer.ffn) // layer.up.rows)
        down = -(-layer.down.nbytes // layer.up.rows)
        return NeuronBytes(nbytes, nbytes, down, tuple(matrix.row_type.name for matrix in layer.ffn))
    down = stored_down_type(layer.down.row_type, down_type, transposed=layer.down_transposed)
    block = BLOCK_SHAPES[down].values
    if layer.width % block:
        raise PlanError(
            f"the down projection cannot be stored as {down.name}: width {layer.width} is not a "
            f"multiple of {block}; choose another --quant"
        )
    types = [*(matrix.row_type for matrix in (layer.gate, layer.up) if matrix is not None), down]
    sizes = [packed_row_bytes(row_type, layer.width) for row_type in types]
    return NeuronBytes(sum(sizes), sizes[0], sizes[-1], tuple(row_type.name for row_type in types))


def shape_of_model(model: "Model") -> ModelShape:
    """The shape of a loaded source model.

    Raises PlanError for a split file: its FFN is already arranged, a plan is made from the source.
    """
    if not model.is_source:
        raise PlanError(
            f"{model.path}: this is a split file; make the plan from the source model "
            "(run takes a smaller --vram on a split file without a new plan)"
        )
    from powerinfer_tools.model.footprint import footprint_of

    hyper, counted = model.hyper, footprint_of(model)
    return ModelShape(
        name=model.name,
        architecture=model.spec.name,
        activation=hyper.activation,
        heads=hyper.heads,
        kv_heads=hyper.kv_heads,
        head_dim=hyper.head_dim,
        trained_context=hyper.trained_context,
        layers=tuple(_layer_of_model(model, counted, index) for index in range(hyper.layers)),
        embedding=_matrix(model.embedding),
        head=_matrix(model.head),
        rope_dim=hyper.rope_dim,
        position_bytes=0 if model.positions is None else model.positions.nbytes,
        parallel=hyper.parallel,
        counted=counted,
        fingerprint=model.fingerprint,
        tied=model.head is model.embedding,
        attention_limit=model.attention_limit,
        placement_limit=model.placement_limit,
    )


def _layer_of_model(model: "Model", counted: "ModelFootprint", index: int) -> LayerShape:
    mixing, feeding, facts = counted.mixing[index], counted.feeding[index], model.hyper.facts[index]
    attention, vectors = tuple(mixing.matrices), mixing.vector_bytes + feeding.vector_bytes
    if model.layers[index].feeds is None:
        none = MatrixShape(TensorType.F32, 0, model.hyper.width)
        return LayerShape(attention, none if model.spec.gated else None, none, none, vectors, facts.window)
    ffn, experts = _ffn_of_model(model, index)
    return LayerShape(
        attention=attention,
        gate=None if ffn.gate is None else _matrix(ffn.gate),
        up=_matrix(ffn.up),
        down=_matrix(ffn.down),
        vector_bytes=vectors,
        window=facts.window,
        down_transposed=ffn.transposed,
        experts=experts,
        top_alone=facts.deviations is not None,
    )


def _ffn_of_model(model: "Model", index: int) -> tuple["DenseFFN", ExpertsShape | None]:
    """The FFN of a layer; of one with experts, the first of them, and how they make a layer."""
    from powerinfer_tools.model.ffn_matrices import ExpertsFFN

    ffn, routing = model.layers[index].ffn, model.hyper.routing
    if routing is None or not isinstance(ffn, ExpertsFFN):
        whole = ExpertsShape(1, 1, ()) if routing is not None and not model.exact_zeros else None
        return model.layers[index].source_ffn, whole
    router = [matrix for matrix in (ffn.router, ffn.shared_gate) if matrix is not None]
    shared = () if ffn.shared is None else ffn.shared.matrices
    return ffn.expert(0), ExpertsShape(
        count=routing.experts,
        used=routing.used,
        router=tuple(_matrix(matrix) for matrix in router),
        shared=tuple(_matrix(matrix) for matrix in shared),
        scaled=any(scale is not None for scale in ffn.scales),
    )


def _matrix(weight: "Weight") -> MatrixShape:
    return MatrixShape(TensorType(weight.row_type), weight.rows, weight.columns)
