"""A model as the engine sees it: checked hyper-parameters and typed views of its weights.

Everything a file can get wrong is found here or in the reader; after :func:`load_model` the engine trusts. No
weight is copied: views point into the mapped file. This module does not know how weights are computed with.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from powerinfer_formats.fingerprint import model_fingerprint
from powerinfer_formats.model_source import ModelSource
from powerinfer_formats.split import SplitFile, SplitLayer
from powerinfer_kernels import RowType
from powerinfer_tools.architectures import RELU_FAMILY, ArchitectureSpec, architecture
from powerinfer_tools.errors import ModelError
from powerinfer_tools.hyperparameters import Hyperparameters, read_hyperparameters
from powerinfer_tools.sources import open_source

Vector = npt.NDArray[np.float32]
#: Row types of matrices that the kernels compute with.
MATRIX_TYPES = frozenset(int(row_type) for row_type in RowType)


@dataclass(frozen=True)
class Weight:
    """A matrix of ``rows`` × ``columns`` as plain rows of blocks; ``data`` is uint8, all rows in order."""

    name: str
    row_type: RowType
    rows: int
    columns: int
    data: npt.NDArray[np.uint8]

    @property
    def nbytes(self) -> int:
        """Size of the rows in the file, in bytes."""
        return self.data.nbytes


@dataclass(frozen=True)
class AttentionWeights:
    """Attention of one layer; norms and biases that the family does not have are None."""

    norm: Vector
    query: Weight
    key: Weight
    value: Weight
    output: Weight
    query_bias: Vector | None
    key_bias: Vector | None
    value_bias: Vector | None
    output_bias: Vector | None
    query_norm: Vector | None
    key_norm: Vector | None
    post_norm: Vector | None


@dataclass(frozen=True)
class DenseFFN:
    """The FFN of a source model: gate and up (neurons, width), down (width, neurons)."""

    gate: Weight
    up: Weight
    down: Weight


@dataclass(frozen=True)
class LayerWeights:
    """All weights of one layer. ``ffn`` is a :class:`DenseFFN`, or a layer of a split file."""

    attention: AttentionWeights
    ffn_norm: Vector
    ffn: DenseFFN | SplitLayer
    ffn_post_norm: Vector | None


@dataclass(frozen=True)
class Model:
    """An opened model, from a source GGUF or a split file."""

    gguf: ModelSource
    spec: ArchitectureSpec
    hyper: Hyperparameters
    embedding: Weight
    head: Weight
    output_norm: Vector
    rope_factors: Vector | None
    layers: Sequence[LayerWeights] = field(repr=False)
    split: SplitFile | None = None

    @property
    def path(self) -> Path:
        """The file the model was read from."""
        return self.gguf.path

    @property
    def name(self) -> str:
        """The model's name for people: ``general.name``, else the file's name."""
        return str(self.gguf.get("general.name", str, self.path.stem)) or self.path.stem

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the weights: of the source model, also for a split file."""
        return self.split.source_fingerprint if self.split else model_fingerprint(self.gguf)

    @property
    def exact_zeros(self) -> bool:
        """Whether the activation makes exact zeros, so that skipping neurons changes nothing."""
        return self.hyper.activation in RELU_FAMILY

    def close(self) -> None:
        """Unmap the file. Views that are still held keep their pages."""
        self.gguf.close()


def load_model(path: str | Path) -> Model:
    """Open and check the model in ``path`` (a GGUF file, or a split file made by convert).

    Raises FormatError for a file that is not well-formed and ModelError for one that cannot be run.
    """
    gguf = open_source(path)
    try:
        return _build(gguf)
    except BaseException:
        gguf.close()
        raise


def _build(gguf: ModelSource) -> Model:
    _refuse_shards(gguf)
    spec = architecture(gguf.get("general.architecture", str), str(gguf.path))
    tensors = _Tensors(gguf)
    embedding_shape = tensors.shape("token_embd.weight")
    if len(embedding_shape) != 2:
        raise ModelError(
            f"{gguf.path}: token_embd.weight has shape {embedding_shape}, not (vocabulary, width)"
        )
    hyper = read_hyperparameters(gguf, spec, vocabulary=embedding_shape[0])
    embedding = tensors.matrix("token_embd.weight", hyper.vocabulary, hyper.width)
    head = embedding
    if tensors.has("output.weight"):
        head = tensors.matrix("output.weight", hyper.vocabulary, hyper.width)
    split = _split(gguf, hyper)
    return Model(
        gguf=gguf,
        spec=spec,
        hyper=hyper,
        embedding=embedding,
        head=head,
        output_norm=tensors.vector("output_norm.weight", hyper.width),
        rope_factors=tensors.optional("rope_freqs.weight", hyper.rope_dim // 2),
        layers=tuple(_layer(tensors, spec, hyper, split, i) for i in range(hyper.layers)),
        split=split,
    )


def _refuse_shards(gguf: ModelSource) -> None:
    count = gguf.get("split.count", int, 1)
    if count > 1:
        raise ModelError(
            f"{gguf.path}: this is one of {count} shards of a model, which are not read singly; "
            "join them first (llama-gguf-split --merge)"
        )


def _split(gguf: ModelSource, hyper: Hyperparameters) -> SplitFile | None:
    split = SplitFile.read(gguf, layers=hyper.layers, neurons=hyper.neurons, width=hyper.width)
    for index, types in enumerate(split.header.types if split else ()):
        for row_type in types:
            if int(row_type) not in MATRIX_TYPES:
                raise ModelError(
                    f"{gguf.path}: FFN rows of layer {index} are of type {row_type.name}, not computable"
                )
    for layer in split.layers if split else ():
        for row_type in layer.predictor.types if layer.predictor else ():
            if int(row_type) not in MATRIX_TYPES:
                raise ModelError(
                    f"{gguf.path}: the predictor of layer {layer.index} is of type {row_type.name}, "
                    "not computable"
                )
    return split


def _layer(
    tensors: "_Tensors", spec: ArchitectureSpec, hyper: Hyperparameters, split: SplitFile | None, index: int
) -> LayerWeights:
    prefix = f"blk.{index}"
    post_norm = tensors.vector if spec.post_norms else tensors.absent
    return LayerWeights(
        attention=_attention(tensors, spec, hyper, prefix),
        ffn_norm=tensors.vector(f"{prefix}.ffn_norm.weight", hyper.width),
        ffn=split.layer(index) if split else _dense_ffn(tensors, hyper, prefix),
        ffn_post_norm=post_norm(f"{prefix}.post_ffw_norm.weight", hyper.width),
    )


def _attention(
    tensors: "_Tensors", spec: ArchitectureSpec, hyper: Hyperparameters, prefix: str
) -> AttentionWeights:
    queries, keys, width = hyper.query_width, hyper.kv_width, hyper.width
    head_norm = tensors.vector if spec.qk_norm else tensors.absent
    post_norm = tensors.vector if spec.post_norms else tensors.absent
    return AttentionWeights(
        norm=tensors.vector(f"{prefix}.attn_norm.weight", width),
        query=tensors.matrix(f"{prefix}.attn_q.weight", queries, width),
        key=tensors.matrix(f"{prefix}.attn_k.weight", keys, width),
        value=tensors.matrix(f"{prefix}.attn_v.weight", keys, width),
        output=tensors.matrix(f"{prefix}.attn_output.weight", width, queries),
        query_bias=tensors.optional(f"{prefix}.attn_q.bias", queries),
        key_bias=tensors.optional(f"{prefix}.attn_k.bias", keys),
        value_bias=tensors.optional(f"{prefix}.attn_v.bias", keys),
        output_bias=tensors.optional(f"{prefix}.attn_output.bias", width),
        query_norm=head_norm(f"{prefix}.attn_q_norm.weight", hyper.head_dim),
        key_norm=head_norm(f"{prefix}.attn_k_norm.weight", hyper.head_dim),
        post_norm=post_norm(f"{prefix}.post_attention_norm.weight", width),
    )


def _dense_ffn(tensors: "_Tensors", hyper: Hyperparameters, prefix: str) -> DenseFFN:
    return DenseFFN(
        gate=tensors.matrix(f"{prefix}.ffn_gate.weight", hyper.neurons, hyper.width),
        up=tensors.matrix(f"{prefix}.ffn_up.weight", hyper.neurons, hyper.width),
        down=tensors.matrix(f"{prefix}.ffn_down.weight", hyper.width, hyper.neurons),
    )


class _Tensors:
    """Typed access to the tensors of a file, by expected shape."""

    def __init__(self, gguf: ModelSource) -> None:
        self.gguf = gguf

    def has(self, name: str) -> bool:
        return name in self.gguf.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        if not self.has(name):
            raise ModelError(f"{self.gguf.path}: tensor {name} is missing; this file holds no language model")
        return tuple(self.gguf.tensors[name].shape)

    def matrix(self, name: str, rows: int, columns: int) -> Weight:
        data = self.gguf.tensor(name, shape=(rows, columns), types=MATRIX_TYPES)
        row_type = RowType(self.gguf.tensors[name].row_type)
        return Weight(name, row_type, rows, columns, np.frombuffer(data, dtype=np.uint8))

    def vector(self, name: str, size: int) -> Vector:
        data = self.gguf.tensor(name, shape=(size,), types=frozenset({int(RowType.F32)}))
        values = np.frombuffer(data, dtype=np.float32)
        if not np.isfinite(values).all():
            raise ModelError(f"{self.gguf.path}: tensor {name} holds values that are not finite")
        return values

    def optional(self, name: str, size: int) -> Vector | None:
        return self.vector(name, size) if self.has(name) else None

    def absent(self, name: str, size: int) -> Vector | None:
        """A norm that the family does not have: a file that carries it is of another family."""
        if self.has(name):
            raise ModelError(
                f"{self.gguf.path}: unexpected tensor {name} of {size} values for this architecture"
            )
        return None
