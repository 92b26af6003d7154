"""Shapes of well-known models, for plans without the model at hand, and what is published about their
sparsity.

Sizes are those of each model's published configuration (config.json on its Hugging Face page). A dtype
applies to every matrix but routers; those, norms and biases are F32. Sparsity figures carry their source, or
say that they are assumed. No figure here or in the cost model is fitted to a published speed.
"""

from dataclasses import dataclass

from powerinfer_formats.block_types import BLOCK_SHAPES, TensorType
from powerinfer_kernels import RowType
from powerinfer_tools.errors import PlanError
from powerinfer_tools.model.matrices import TILE_ROWS, MatrixShape
from powerinfer_tools.model.predictor_shapes import Predictors, low_rank
from powerinfer_tools.model.shapes import ExpertsShape, LayerShape, ModelShape, PublishedSparsity

#: Looked up in the papers on 2026-11-25. Densities are 1 − the sparsity that is given; where a range is
#: given, its middle. Hot shares are of the whole model's neurons; what differs from layer to layer is not
#: published, so every layer has the whole model's curve.
_POWERINFER = "PowerInfer (arXiv 2312.12456)"
_TABLE = f"{_POWERINFER}, table 3"
_HOT_OPT = f"80 % of the activations from 17 % of the neurons: {_POWERINFER}, section 3.1, OPT-30B"
_HOT_RELU = f"80 % of the activations from 26 % of the neurons: {_POWERINFER}, section 3.1, LLaMA2(ReGLU)-70B"
# 26 % of the neurons cannot make 80 % of the activations at 7B's density; within one layer of 70B it is 43 %.
_HOT_LAYER = f"80 % of the activations from 43 %: {_POWERINFER}, section 3.1, one layer of LLaMA2(ReGLU)-70B"
_PROSPARSE = "ProSparse (arXiv 2402.13516), table 2"
#: Predicted over active neurons. ProSparse, table 2, has 1.24 and 0.99 for ReluLLaMA-7B and -13B, 1.99 and
#: 1.94 for ProSparse-7B and -13B; other models are counted with their mean. This project's own predictors:
#: 1.39 at a recall of 95 % (docs/LOG.md).
_OVERSHOOT = 1.54
#: Weights of predictors over those of the model: 6 % at a loss of perplexity below 0.1 % (PowerInfer, section
#: 5.1). Stored as Q4_0, the default of this project's train.
PREDICTOR_SHARE = 0.06
PREDICTOR_TYPE = TensorType.Q4_0


def _sparsity(
    density: float, density_source: str, hot: float, hot_source: str, overshoot: float = _OVERSHOOT
) -> PublishedSparsity:
    source = f"density {100 * density:.4g} %: {density_source}; {hot_source}; predictors name "
    source += f"{overshoot:.2f} × as many neurons as are active"
    source += f" ({_PROSPARSE}{', mean of four models' if overshoot == _OVERSHOOT else ''})"
    return PublishedSparsity(density, hot, 0.8, source, overshoot)


_OPT = _sparsity(0.03, f"{_TABLE}, 96 to 98 % of zeros in OPT", 0.17, _HOT_OPT)
_RELU_7B = _sparsity(0.30, _TABLE, 0.43, f"{_HOT_LAYER}, assumed here", 1.24)
_RELU_13B = _sparsity(0.22, _TABLE, 0.26, f"{_HOT_RELU}, assumed here", 0.99)
_RELU_70B = _sparsity(0.18, _TABLE, 0.26, _HOT_RELU)
_PROSPARSE_7B = _sparsity(0.1068, _PROSPARSE, 0.26, f"{_HOT_RELU}, assumed here", 1.99)
_PROSPARSE_13B = _sparsity(0.1120, _PROSPARSE, 0.26, f"{_HOT_RELU}, assumed here", 1.94)
_FALCON = _sparsity(0.05, _TABLE, 0.17, f"{_HOT_OPT}, assumed here")
_BAMBOO = _sparsity(0.10, _TABLE, 0.26, f"{_HOT_RELU}, assumed here")


@dataclass(frozen=True)
class PublishedModel:
    """One row of the table: sizes in values. ``head_dim`` 0: the width divided by the heads. With
    ``experts``, a token takes ``used`` of them, ``neurons`` are those of one, and ``shared`` those of the one
    that every token takes."""

    name: str
    architecture: str
    activation: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    neurons: int
    vocabulary: int
    context: int
    gated: bool = True
    tied: bool = False
    biases: bool = False
    positions: int = 0
    sparsity: PublishedSparsity | None = None
    head_dim: int = 0
    experts: int = 0
    used: int = 0
    shared: int = 0

    @property
    def head_width(self) -> int:
        """Values of a head."""
        return self.head_dim or self.width // self.heads


def _opt(name: str, layers: int, width: int, heads: int) -> PublishedModel:
    # OPT (arXiv 2205.01068, table 1): FFN 4 × width, learned positions (2,048 and 2 reserved), biases
    # everywhere.
    return PublishedModel(
        name,
        "opt",
        "relu",
        layers,
        width,
        heads,
        heads,
        4 * width,
        50272,
        2048,
        gated=False,
        tied=True,
        biases=True,
        positions=2050,
        sparsity=_OPT,
    )


def _llama(
    name: str,
    layers: int,
    width: int,
    heads: int,
    kv_heads: int,
    neurons: int,
    activation: str = "silu",
    sparsity: PublishedSparsity | None = None,
) -> PublishedModel:
    # Llama 2 (arXiv 2307.09288) and its ReLU fine-tunes.
    return PublishedModel(
        name, "llama", activation, layers, width, heads, kv_heads, neurons, 32000, 4096, sparsity=sparsity
    )


PUBLISHED: dict[str, PublishedModel] = {
    model.name: model
    for model in (
        PublishedModel("smollm2-135m", "llama", "silu", 30, 576, 9, 3, 1536, 49152, 8192, tied=True),
        _opt("opt-6.7b", 32, 4096, 32),
        _opt("opt-13b", 40, 5120, 40),
        _opt("opt-30b", 48, 7168, 56),
        _opt("opt-66b", 64, 9216, 72),
        _opt("opt-175b", 96, 12288, 96),
        _llama("llama-2-7b", 32, 4096, 32, 32, 11008),
        _llama("llama-2-13b", 40, 5120, 40, 40, 13824),
        _llama("llama-2-70b", 80, 8192, 64, 8, 28672),
        _llama("relu-llama-2-7b", 32, 4096, 32, 32, 11008, "relu", _RELU_7B),
        _llama("relu-llama-2-13b", 40, 5120, 40, 40, 13824, "relu", _RELU_13B),
        _llama("relu-llama-2-70b", 80, 8192, 64, 8, 28672, "relu", _RELU_70B),
        _llama("prosparse-llama-2-7b", 32, 4096, 32, 32, 11008, "relu", _PROSPARSE_7B),
        _llama("prosparse-llama-2-13b", 40, 5120, 40, 40, 13824, "relu", _PROSPARSE_13B),
        PublishedModel("falcon-40b", "falcon", "gelu_erf", 60, 8192, 128, 8, 32768, 65024, 2048, gated=False),
        PublishedModel(
            "relu-falcon-40b",
            "falcon",
            "relu",
            60,
            8192,
            128,
            8,
            32768,
            65024,
            2048,
            gated=False,
            sparsity=_FALCON,
        ),
        PublishedModel("mistral-7b", "llama", "silu", 32, 4096, 32, 8, 14336, 32000, 32768),
        PublishedModel(
            "bamboo-7b", "bamboo", "drelu", 32, 4096, 32, 8, 14336, 32000, 32768, sparsity=_BAMBOO
        ),
        PublishedModel(
            "mixtral-8x7b", "llama", "silu", 32, 4096, 32, 8, 14336, 32000, 32768, experts=8, used=2
        ),
        PublishedModel(
            "qwen1.5-moe-a2.7b",
            "qwen2moe",
            "silu",
            24,
            2048,
            16,
            16,
            1408,
            151936,
            8192,
            experts=60,
            used=4,
            shared=5632,
        ),
        PublishedModel(
            "qwen3-30b-a3b",
            "qwen3moe",
            "silu",
            48,
            2048,
            32,
            4,
            768,
            151936,
            40960,
            head_dim=128,
            experts=128,
            used=8,
        ),
    )
}

#: What --dtype may say for a named shape: the row types that the kernels compute with.
DTYPES: dict[str, TensorType] = {row_type.name.lower(): TensorType(row_type) for row_type in RowType}


def published_shape(name: str, dtype: str = "q4_0") -> ModelShape:
    """The shape ``name`` with every matrix stored as ``dtype``.

    Raises PlanError with a list of the names or types, and for a dtype whose blocks do not fit.
    """
    model = PUBLISHED.get(name.lower())
    if model is None:
        raise PlanError(f"no shape is called {name!r}; there are: {', '.join(PUBLISHED)}")
    row_type = DTYPES.get(dtype.lower())
    if row_type is None:
        raise PlanError(f"no row type is called {dtype!r}; there are: {', '.join(DTYPES)}")
    layer = _layer(model, row_type)
    table = MatrixShape(row_type, model.vocabulary, model.width)
    shape = ModelShape(
        name=f"{model.name} {row_type.name}",
        architecture=model.architecture,
        activation=model.activation,
        heads=model.heads,
        kv_heads=model.kv_heads,
        head_dim=model.head_width,
        trained_context=model.context,
        layers=(layer,) * model.layers,
        embedding=table,
        head=table,
        rope_dim=0 if model.positions else model.head_width,
        position_bytes=4 * model.positions * model.width,
        sparsity=model.sparsity,
        tied=model.tied,
    )
    _check_blocks(shape, row_type)
    return shape


def assumed_predictors(shape: ModelShape) -> Predictors:
    """Predictors of the published size, equal in every layer, for a shape with published sparsity."""
    assert shape.sparsity is not None
    weights = PREDICTOR_SHARE * shape.weights / len(shape.layers)
    block = max(BLOCK_SHAPES[PREDICTOR_TYPE].values, TILE_ROWS)
    return tuple(
        low_rank(
            max(block, round(weights / (layer.width + layer.neurons)) // block * block),
            PREDICTOR_TYPE,
            layer.width,
            shape.sparsity.overshoot,
        )
        for layer in shape.layers
    )


def _layer(model: PublishedModel, row_type: TensorType) -> LayerShape:
    width, neurons = model.width, model.neurons
    queries, keys = model.heads * model.head_width, model.kv_heads * model.head_width
    # Llama: two RMS norms. OPT and Falcon: two layer norms with biases; OPT also biases of all six matrices.
    norms = 2 * width if model.gated else 4 * width
    biases = 2 * width + 2 * keys + neurons + width if model.biases else 0
    up = MatrixShape(row_type, neurons, width)
    return LayerShape(
        attention=(
            MatrixShape(row_type, queries, width),
            MatrixShape(row_type, keys, width),
            MatrixShape(row_type, keys, width),
            MatrixShape(row_type, width, queries),
        ),
        gate=up if model.gated else None,
        up=up,
        down=MatrixShape(row_type, width, neurons),
        vector_bytes=4 * (norms + biases),
        experts=_experts(model, row_type) if model.experts else None,
    )


def _experts(model: PublishedModel, row_type: TensorType) -> ExpertsShape:
    router = [MatrixShape(TensorType.F32, model.experts, model.width)]
    if not model.shared:
        return ExpertsShape(model.experts, model.used, tuple(router))
    rows = MatrixShape(row_type, model.shared, model.width)
    shared = (rows, rows, MatrixShape(row_type, model.width, model.shared))
    router.append(MatrixShape(TensorType.F32, 1, model.width))
    return ExpertsShape(model.experts, model.used, tuple(router), shared)


def _check_blocks(shape: ModelShape, row_type: TensorType) -> None:
    block = BLOCK_SHAPES[row_type].values
    neurons = shape.layers[0].up.rows
    if shape.width % block or neurons % block:
        raise PlanError(
            f"{shape.name}: its width {shape.width} and {neurons} neurons do not hold "
            f"whole blocks of {block}; choose another --dtype"
        )
