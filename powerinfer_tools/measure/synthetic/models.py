"""Models of real shapes with random weights, to time what is too large to fetch. Their text is noise.

The file is a complete GGUF that other programs load too, streamed to disk: memory stays at one piece of one
tensor. ``general.name`` says that it is synthetic. Values have zero mean and a deviation of 1/√columns, so
that activations stay finite and every arithmetic path runs at its normal speed.

With experts, embeddings have a deviation of 1, and what attention and FFNs add a hundredth of that: random
layers add much the same for every token, so that in deep layers all tokens would take the same experts.
Like this, the routers, which are random rows, choose all experts about equally often, whatever came before,
unless :mod:`.topics` says otherwise.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from powerinfer_formats.file_types import file_type_number
from powerinfer_formats.gguf_layout import ValueType
from powerinfer_formats.gguf_writer import GGUFWriter
from powerinfer_kernels import RowType, quantize
from powerinfer_tools.measure.synthetic.random_blocks import (
    BALANCED,
    BLOCKS,
    balance,
    fitting_type,
    random_rows,
)
from powerinfer_tools.measure.synthetic.recurrent import (
    Matrix,
    Recurrence,
    layer_parts,
    state_space,
    time_mixing,
)
from powerinfer_tools.measure.synthetic.shapes import Shape
from powerinfer_tools.measure.synthetic.topics import Topics, embeddings, router_rows

#: Values drawn at a time: bounds the memory of the writer.
PIECE_VALUES = 1 << 24
#: Of models with experts: the deviation of what a block adds to a residual stream of deviation 1, and the
#: matrices that it depends on.
_ADDED = 0.01
_ADDING = (".attn_output.", ".ffn_down", ".ssm_out.")
#: Types that the kernels round to.
_ROUNDED = ("F32", "F16", "BF16", "Q8_0", "Q4_0")


#: A mixture's name → the type of most matrices and of the sensitive ones.
MIXTURES = {"Q4_K_M": ("Q4_K", "Q6_K"), "Q5_K_M": ("Q5_K", "Q6_K")}
TYPES = tuple(BLOCKS) + tuple(MIXTURES)


@dataclass(frozen=True)
class Tensor:
    """One tensor to be: ``row_type`` is a name of ``random_blocks.BLOCKS``; vectors are (columns,), the
    matrices of experts (experts, rows, columns)."""

    name: str
    shape: tuple[int, ...]
    row_type: str = "F32"

    @property
    def nbytes(self) -> int:
        """Size in the file, without padding."""
        block = BLOCKS[self.row_type]
        return math.prod(self.shape) // block.values * block.nbytes


def tensors_of(shape: Shape, mixture: str) -> Iterator[Tensor]:
    """Every tensor of a model of ``shape`` in file order, typed as quantisers type them.

    A matrix whose columns are no multiple of 256 gets the nearest plain type instead of a K type.
    """
    usual, sensitive = MIXTURES.get(mixture, (mixture, mixture))

    def matrix(name: str, rows: int, columns: int, row_type: str = usual) -> Tensor:
        return Tensor(f"{name}.weight", (rows, columns), fitting_type(row_type, columns))

    yield matrix("token_embd", shape.vocabulary, shape.width, sensitive if shape.tied else usual)
    if shape.spec.position_offset is not None:
        yield Tensor("position_embd.weight", (shape.context + shape.spec.position_offset, shape.width))
    if shape.spec.embedding_norm == "weights":
        yield from _norm(shape, "token_embd_norm", shape.width)
    for layer in range(shape.layers):
        if shape.recurrence is None:
            yield from _layer_tensors(shape, layer, usual, sensitive)
        else:
            yield from _mixed_tensors(shape, shape.recurrence, layer, usual, sensitive)
    yield from _norm(shape, "output_norm", shape.width)
    if not shape.tied:
        yield matrix("output", shape.vocabulary, shape.width, sensitive)


def _mixed_tensors(shape: Shape, r: Recurrence, layer: int, usual: str, sensitive: str) -> Iterator[Tensor]:
    """A layer of a model that mixes tokens without attention, in some layers or in all."""
    more = sensitive if _gets_more_bits(layer, shape.layers) else usual
    spec, prefix, parts = shape.spec, f"blk.{layer}", list(layer_parts(r, layer))
    attention, ffn = _matrices(shape, usual, more)
    matrices, floats = list[Matrix](), list[Matrix]()
    if "state space" in parts or "time mixing" in parts:
        matrices, floats = (state_space if r.pattern else time_mixing)(r, shape.width)
    named = [*(attention if "attention" in parts else ()), *(ffn if "ffn" in parts else ())]
    for name, rows, columns, row_type in named:
        yield Tensor(f"{prefix}.{name}.weight", (rows, columns), fitting_type(row_type, columns))
    for name, size in matrices:
        yield Tensor(f"{prefix}.{name}", size, fitting_type(usual, size[-1]))
    for name, size in floats:
        yield Tensor(f"{prefix}.{name}", size)
    if "experts" in parts:
        yield from _expert_tensors(shape, prefix, usual, more)
    for name in {"attn_norm", spec.ffn_norm}:
        yield from _norm(shape, f"{prefix}.{name}", shape.width)


Sized = tuple[str, int, int, str]


def _matrices(shape: Shape, usual: str, more: str) -> tuple[list[Sized], list[Sized]]:
    """Name, rows, columns and type of each matrix of attention, and of a dense FFN."""
    queries, keys, width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.width
    fused = [("attn_qkv", queries + 2 * keys, width, usual)]
    parts = [("attn_q", queries, width, usual), ("attn_k", keys, width, usual), ("attn_v", keys, width, more)]
    attention = [*(fused if shape.spec.fused_qkv else parts), ("attn_output", width, queries, usual)]
    if shape.latent is not None:
        attention = [(*matrix, usual) for matrix in shape.latent.matrices(shape.heads, width)]
    return attention, _ffn("", shape.neurons, shape, usual, more)


def _layer_tensors(shape: Shape, layer: int, usual: str, sensitive: str) -> Iterator[Tensor]:
    width, more = shape.width, sensitive if _gets_more_bits(layer, shape.layers) else usual
    attention, ffn = _matrices(shape, usual, more)
    matrices = [*attention, *([] if shape.experts else ffn)]
    norms = {"attn_norm": width, shape.spec.ffn_norm: width}
    if shape.spec.post_norms:
        norms |= {"post_attention_norm": shape.width, "post_ffw_norm": shape.width}
    if shape.spec.qk_norm != "none":
        norms |= {"attn_q_norm": shape.head_dim, "attn_k_norm": shape.head_dim}
    if shape.spec.inner_norms:
        norms |= {"attn_sub_norm": shape.heads * shape.head_dim, "ffn_sub_norm": shape.neurons}
    if shape.latent is not None:
        norms["attn_kv_a_norm"] = shape.latent.rank
    for name, rows, columns, row_type in matrices:
        yield Tensor(f"blk.{layer}.{name}.weight", (rows, columns), fitting_type(row_type, columns))
    if shape.experts:
        yield from _expert_tensors(shape, f"blk.{layer}", usual, more)
    biased = {"none": 0, "qkv": 3, "all": len(matrices)}[shape.biases]
    for name, length, *_ in matrices[:biased]:
        yield Tensor(f"blk.{layer}.{name}.bias", (length,))
    for name, length in norms.items():
        yield from _norm(shape, f"blk.{layer}.{name}", length)


def _ffn(suffix: str, neurons: int, shape: Shape, usual: str, more: str) -> list[tuple[str, int, int, str]]:
    """Name, rows, columns and type of each matrix of an FFN."""
    gate = [(f"ffn_gate{suffix}", neurons, shape.width, usual)] if shape.spec.gated else []
    up, down = shape.spec.ffn_names
    return [
        *gate,
        (f"{up}{suffix}", neurons, shape.width, usual),
        (f"{down}{suffix}", shape.width, neurons, more),
    ]


def _expert_tensors(shape: Shape, prefix: str, usual: str, more: str) -> Iterator[Tensor]:
    """Routers are not quantised. Those by sigmoids have biases, others a weight for the shared expert."""
    by_sigmoid = shape.spec.router == "sigmoid"
    yield Tensor(f"{prefix}.ffn_gate_inp.weight", (shape.experts, shape.width))
    if by_sigmoid:
        yield Tensor(f"{prefix}.exp_probs_b.bias", (shape.experts,))
    for name, rows, columns, row_type in _ffn("_exps", shape.neurons, shape, usual, more):
        kind = fitting_type(row_type, columns)
        yield Tensor(f"{prefix}.{name}.weight", (shape.experts, rows, columns), kind)
    if shape.shared and not by_sigmoid:
        yield Tensor(f"{prefix}.ffn_gate_inp_shexp.weight", (shape.width,))
    if shape.shared:
        for name, rows, columns, row_type in _ffn("_shexp", shape.shared, shape, usual, more):
            yield Tensor(f"{prefix}.{name}.weight", (rows, columns), fitting_type(row_type, columns))


def _norm(shape: Shape, name: str, length: int) -> Iterator[Tensor]:
    yield Tensor(f"{name}.weight", (length,))
    if shape.spec.norm == "layer":
        yield Tensor(f"{name}.bias", (length,))


def _gets_more_bits(layer: int, layers: int) -> bool:
    """llama.cpp's rule for the _M mixtures: the first and last eighth of the layers, every third between."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def write_synthetic(
    path: Path,
    name: str,
    shape: Shape,
    mixture: str,
    seed: int = 0,
    topics: Topics | None = None,
    density: float | None = None,
) -> int:
    """Write the model and return its size in bytes; ``topics``: how its routers choose, instead of equally
    often; ``density``: the share of the neurons of an expert that fire, by a cut of their gates (FATReLU, in
    place of the shape's own activation). Raises FormatError or OSError where that fails."""
    tensors = [_typed(tensor, topics) for tensor in tensors_of(shape, mixture)]
    rng = np.random.Generator(np.random.SFC64(seed))
    with GGUFWriter(path) as writer:
        add_metadata(writer, name, shape, mixture)
        if density is not None:
            deviation = BALANCED if mixture == "Q4_0" else 1.0  # of gates, whose inputs are about N(0, 1)
            cut = max(0.0, NormalDist().inv_cdf(1 - density) * deviation)
            writer.add("powerinfer.activation", "fatrelu")
            writer.add("powerinfer.activation_threshold", cut, ValueType.FLOAT32)
        elif shape.activation is not None:
            writer.add("powerinfer.activation", shape.activation)
        if topics is not None:
            topics.write(writer)
        for tensor in tensors:
            writer.declare(tensor.name, BLOCKS[tensor.row_type].code, tensor.shape)
        for tensor in tensors:
            for piece in _with_topics(rng, shape, tensor, topics):
                writer.write(tensor.name, piece)
    return path.stat().st_size


def _typed(tensor: Tensor, topics: Topics | None) -> Tensor:
    """Of values that are not drawn but rounded, the type must be one that the kernels write."""
    if topics is None or tensor.name != "token_embd.weight" or tensor.row_type in _ROUNDED:
        return tensor
    return replace(tensor, row_type="Q8_0")


def _with_topics(
    rng: np.random.Generator, shape: Shape, tensor: Tensor, topics: Topics | None
) -> Iterator[NDArray[np.generic]]:
    """The values of a tensor, where embeddings and routers know topics."""
    if topics is not None and tensor.name.endswith("ffn_gate_inp.weight"):
        yield router_rows(rng, shape.experts, shape.width, topics)
    elif topics is not None and tensor.name == "token_embd.weight":
        step = max(1, PIECE_VALUES // shape.width)
        for first in range(0, shape.vocabulary, step):
            values = embeddings(rng, first, min(step, shape.vocabulary - first), shape.width)
            yield quantize(values, RowType[tensor.row_type])
    else:
        yield from pieces(rng, shape, tensor)


def pieces(rng: np.random.Generator, shape: Shape, tensor: Tensor) -> Iterator[NDArray[np.generic]]:
    """The values of a tensor, some rows at a time."""
    if tensor.name.endswith("ssm_a"):  # states decay
        yield -rng.uniform(0.1, 2.0, tensor.shape).astype(np.float32)
        return
    if tensor.name.endswith("ssm_norm.weight"):
        yield (1.0 + 0.1 * rng.standard_normal(tensor.shape)).astype(np.float32)
        return
    if len(tensor.shape) == 1:
        is_norm = tensor.name.endswith("norm.weight")
        deviation = 0.1 if is_norm or tensor.name.endswith(".bias") else tensor.shape[0] ** -0.5
        yield (is_norm + deviation * rng.standard_normal(tensor.shape[0])).astype(np.float32)
        return
    *counts, columns = tensor.shape
    rows, deviation = math.prod(counts), _deviation(shape, tensor)
    step = max(1, PIECE_VALUES // columns)
    for first in range(0, rows, step):
        values = random_rows(rng, tensor.row_type, min(step, rows - first), columns, deviation)
        if shape.experts and tensor.row_type == "Q4_0":
            balance(values)
        yield values


def _deviation(shape: Shape, tensor: Tensor) -> float:
    """Of the values of a matrix."""
    usual = float(tensor.shape[-1] ** -0.5)
    if not shape.experts:
        return usual
    if tensor.name == "token_embd.weight":
        return 1.0
    return usual * (_ADDED if any(name in tensor.name for name in _ADDING) else 1.0)


def add_metadata(writer: GGUFWriter, name: str, shape: Shape, mixture: str) -> None:
    """Everything that is no tensor, with a vocabulary of bytes and fillers."""
    prefix = shape.architecture
    writer.add("general.architecture", prefix)
    writer.add("general.type", "model")
    writer.add("general.name", f"{name} {mixture}, synthetic: random weights")
    integers: dict[str, int | list[int]] = {
        "general.file_type": file_type_number(mixture),
        "general.quantization_version": 2,
        f"{prefix}.block_count": shape.layers,
        f"{prefix}.context_length": shape.context,
        f"{prefix}.embedding_length": shape.width,
        f"{prefix}.feed_forward_length": shape.neurons,
        f"{prefix}.attention.head_count": shape.heads,
        f"{prefix}.attention.head_count_kv": shape.kv_heads,
        f"{prefix}.attention.key_length": shape.head_dim,
        f"{prefix}.attention.value_length": shape.head_dim,
        f"{prefix}.vocab_size": shape.vocabulary,
    }
    if shape.experts:
        integers |= {f"{prefix}.expert_count": shape.experts, f"{prefix}.expert_used_count": shape.used}
    if shape.experts and prefix != "llama":  # of Mixtral, feed_forward_length is that of an expert
        integers[f"{prefix}.expert_feed_forward_length"] = shape.neurons
    if shape.shared:
        integers[f"{prefix}.expert_shared_feed_forward_length"] = shape.shared
    rotary = shape.spec.rope_style != "none"
    if rotary:
        integers[f"{prefix}.rope.dimension_count"] = shape.head_dim
    if shape.window:
        integers[f"{prefix}.attention.sliding_window"] = shape.window
    if shape.recurrence is not None:
        keys = shape.recurrence.keys(shape.layers, shape.neurons, shape.kv_heads)
        integers |= {f"{prefix}.{key}": value for key, value in keys.items()}
    if shape.latent is not None:
        integers |= {f"{prefix}.{key}": value for key, value in shape.latent.keys().items()}
    for key, value in integers.items():
        writer.add(key, value, ValueType.UINT32)
    if rotary:
        writer.add(f"{prefix}.rope.freq_base", shape.rope_base, ValueType.FLOAT32)
    kind = "_rms" if shape.spec.norm == "rms" else ""
    writer.add(f"{prefix}.attention.layer_norm{kind}_epsilon", 1e-5, ValueType.FLOAT32)
    _add_vocabulary(writer, shape.vocabulary)


def _add_vocabulary(writer: GGUFWriter, size: int) -> None:
    """Bytes and fillers: every text tokenises, into its bytes, whatever the size of the vocabulary."""
    control = ["<unk>", "<s>", "</s>"]
    tokens = [*control, *(f"<0x{byte:02X}>" for byte in range(256))]
    fillers = size - len(tokens)
    tokens += [f"<filler {index}>" for index in range(fillers)]
    writer.add("tokenizer.ggml.model", "llama")
    writer.add("tokenizer.ggml.pre", "default")
    writer.add("tokenizer.ggml.tokens", tokens)
    writer.add("tokenizer.ggml.scores", [-1e4] * size, ValueType.FLOAT32)
    # Token types of the format: 2 unknown, 3 control, 6 byte, 1 normal. No merge leads to a filler.
    writer.add("tokenizer.ggml.token_type", [2, 3, 3] + [6] * 256 + [1] * fillers, ValueType.INT32)
    for key, token in (("unknown", 0), ("bos", 1), ("eos", 2)):
        writer.add(f"tokenizer.ggml.{key}_token_id", token, ValueType.UINT32)
    writer.add("tokenizer.ggml.add_bos_token", True)
