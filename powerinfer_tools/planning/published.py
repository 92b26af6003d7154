"""Shapes of well-known models, for plans without the model at hand, and what is published about their
sparsity.

Sizes are those of each model's published configuration (config.json on its Hugging Face page). A dtype
applies to every matrix; norms and biases are F32. Sparsity figures carry their source, or say that they are
assumed.
"""

from dataclasses import dataclass

from powerinfer_formats.block_types import BLOCK_SHAPES, TensorType
from powerinfer_tools.errors import PlanError
from powerinfer_tools.planning.shapes import LayerShape, MatrixShape, ModelShape, PublishedSparsity

_POWERINFER = "PowerInfer (arXiv 2312.12456), section 2: neurons that make 80 % of the activations"
_DEJA_VU = "Deja Vu (ICML 2023): about 95 % of MLP parameters are not needed for a token"
_PROSPARSE = "ProSparse (arXiv 2402.13516), table of activation sparsity"

_OPT = PublishedSparsity(
    0.05,
    0.17,
    0.8,
    f"density: {_DEJA_VU} in OPT-175B; hot share 17 %: {_POWERINFER} in OPT-30B; both assumed for every OPT",
)
# 26 % of the neurons cannot make 80 % of the activations at these densities; within one layer it is 43 %.
_LAYER_SHARE = "hot share 43 %: PowerInfer (arXiv 2312.12456), section 2, one layer of LLaMA(ReGLU)-70B"
_RELU_7B = PublishedSparsity(1 - 0.6698, 0.43, 0.8, f"density 33.02 %: {_PROSPARSE}; {_LAYER_SHARE}")
_RELU_13B = PublishedSparsity(1 - 0.7156, 0.43, 0.8, f"density 28.44 %: {_PROSPARSE}; {_LAYER_SHARE}")
_RELU_70B = PublishedSparsity(
    1 - 0.7156, 0.26, 0.8, f"density assumed as ReluLLaMA-13B's ({_PROSPARSE}); hot share 26 %: {_POWERINFER}"
)
_PROSPARSE_7B = PublishedSparsity(
    1 - 0.8932, 0.26, 0.8, f"density 10.68 %: {_PROSPARSE}; hot share assumed 26 % ({_POWERINFER})"
)
_PROSPARSE_13B = PublishedSparsity(
    1 - 0.8880, 0.26, 0.8, f"density 11.20 %: {_PROSPARSE}; hot share assumed 26 % ({_POWERINFER})"
)
_FALCON = PublishedSparsity(0.05, 0.17, 0.8, "assumed as OPT's: like OPT, an FFN of two matrices with ReLU")
_BAMBOO = PublishedSparsity(
    0.10,
    0.26,
    0.8,
    "density assumed 10 %: TurboSparse (arXiv 2406.05955) reports about "
    f"90 % sparsity with dReLU; hot share assumed 26 % ({_POWERINFER})",
)


@dataclass(frozen=True)
class PublishedModel:
    """One row of the table: sizes in values."""

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
    )
}

#: What --dtype may say for a named shape: the row types that the kernels compute with.
DTYPES: dict[str, TensorType] = {
    row_type.name.lower(): row_type
    for row_type in (
        TensorType.F32,
        TensorType.F16,
        TensorType.BF16,
        TensorType.Q8_0,
        TensorType.Q4_0,
        TensorType.Q4_1,
        TensorType.Q5_0,
        TensorType.Q5_1,
        TensorType.Q4_K,
        TensorType.Q5_K,
        TensorType.Q6_K,
    )
}


def published_shape(name: str, dtype: str = "q4_0") -> ModelShape:
    """The shape ``name`` with every matrix stored as ``dtype``.

    Raises PlanError listing the names or types that there are, and for a dtype whose blocks do not fit.
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
        head_dim=model.width // model.heads,
        trained_context=model.context,
        layers=(layer,) * model.layers,
        embedding=table,
        head=table,
        rope_dim=0 if model.positions else model.width // model.heads,
        position_bytes=4 * model.positions * model.width,
        sparsity=model.sparsity,
    )
    _check_blocks(shape, row_type)
    return shape


def _layer(model: PublishedModel, row_type: TensorType) -> LayerShape:
    width, neurons = model.width, model.neurons
    keys = model.kv_heads * (width // model.heads)
    # Llama: two RMS norms. OPT and Falcon: two layer norms with biases; OPT also biases of all six matrices.
    norms = 2 * width if model.gated else 4 * width
    biases = 2 * width + 2 * keys + neurons + width if model.biases else 0
    up = MatrixShape(row_type, neurons, width)
    return LayerShape(
        attention=(
            MatrixShape(row_type, width, width),
            MatrixShape(row_type, keys, width),
            MatrixShape(row_type, keys, width),
            MatrixShape(row_type, width, width),
        ),
        gate=up if model.gated else None,
        up=up,
        down=MatrixShape(row_type, width, neurons),
        vector_bytes=4 * (norms + biases),
    )


def _check_blocks(shape: ModelShape, row_type: TensorType) -> None:
    block = BLOCK_SHAPES[row_type].values
    if shape.width % block or shape.layers[0].neurons % block:
        raise PlanError(
            f"{shape.name}: its width {shape.width} and {shape.layers[0].neurons} neurons do not hold "
            f"whole blocks of {block}; choose another --dtype"
        )
