"""A validated view of a split file of a mixture of experts: experts sorted hottest first.

Experts are placed as wholes, so both sides take the source's matrices, bit for bit; nothing is transposed or
quantised again. One tensor of each kind holds all experts of a layer, the hot ones first: a smaller budget
moves the split point, no rows.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from powerinfer_formats import errors
from powerinfer_formats import split_layout as names
from powerinfer_formats.block_types import BLOCK_SHAPES, TensorType
from powerinfer_formats.gguf_layout import ValueType
from powerinfer_formats.gguf_reader import GGUFFile
from powerinfer_formats.gguf_writer import GGUFWriter
from powerinfer_formats.model_source import ModelSource
from powerinfer_formats.split_devices import KEY_PREDICTOR, SplitDevices, all_on_cpu, read_devices
from powerinfer_formats.split_keys import KeyReader

#: The version of split files with experts; without, 1.
VERSION = 2
KEY_HOT = "powerinfer.hot_experts"
KEY_HOT_SHARED = "powerinfer.hot_shared_experts"


def order_name(layer: int) -> str:
    """I32 [experts]: the source's expert at each position, hottest first."""
    return f"blk.{layer}.expert_order"


def experts_name(layer: int, kind: str) -> str:
    """The matrices of all experts, [experts, neurons, width], or [experts, width, neurons] for ``kind``
    down."""
    return f"blk.{layer}.ffn_{kind}_experts.weight"


def source_name(layer: int, kind: str) -> str:
    """The same in a source model, in its own order."""
    return f"blk.{layer}.ffn_{kind}_exps.weight"


@dataclass(frozen=True)
class ExpertSizes:
    """What a split file must fit: layers, experts of each and their neurons, the model's width, and whether
    every token takes a shared expert besides."""

    layers: int
    experts: int
    neurons: int
    width: int
    shared: bool

    def shape(self, kind: str) -> tuple[int, int, int]:
        """Of the matrices of all experts of a layer."""
        rows, columns = (self.width, self.neurons) if kind == "down" else (self.neurons, self.width)
        return self.experts, rows, columns


@dataclass(frozen=True)
class ExpertsHeader:
    """What the file says about itself. ``hot`` experts of each layer; ``hot_shared``: whether the shared one
    is hot, empty where there is none; ``corpus_hashes`` and ``corpus_tokens`` name the profile's corpora.
    ``devices`` None: all but experts is on the CPU."""

    source_fingerprint: str
    hot: tuple[int, ...]
    hot_shared: tuple[bool, ...]
    tool_version: str
    corpus_hashes: tuple[str, ...] = ()
    corpus_tokens: int = 0
    devices: SplitDevices | None = None

    def write(self, writer: GGUFWriter) -> None:
        """Add the ``powerinfer.*`` keys."""
        writer.add(names.KEY_VERSION, VERSION, ValueType.UINT32)
        writer.add(names.KEY_SOURCE, self.source_fingerprint)
        writer.add(KEY_HOT, self.hot, ValueType.UINT32)
        if self.hot_shared:
            writer.add(KEY_HOT_SHARED, [int(hot) for hot in self.hot_shared], ValueType.UINT32)
        writer.add(names.KEY_TOOL_VERSION, self.tool_version)
        writer.add(names.KEY_CORPUS_HASHES, self.corpus_hashes, ValueType.STRING)
        writer.add(names.KEY_CORPUS_TOKENS, self.corpus_tokens, ValueType.UINT64)
        if self.devices is not None:
            self.devices.write(writer)


@dataclass(frozen=True, eq=False)
class SplitExperts:
    """A split file whose every rule has been checked. ``orders`` int32 [experts] of each layer."""

    gguf: ModelSource
    header: ExpertsHeader
    sizes: ExpertSizes
    orders: tuple[NDArray[np.int32], ...]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Open ``path``; the model's sizes are taken from its own metadata. Raises ``FormatError``."""
        gguf = GGUFFile.open(path)
        try:
            return cls.read(gguf, _sizes(gguf))
        except BaseException:
            gguf.close()
            raise

    @classmethod
    def read(cls, gguf: ModelSource, sizes: ExpertSizes) -> Self:
        """The view of an open file that claims to be a split file. Raises ``FormatError``."""
        checker = _Checker(gguf, sizes)
        header = checker.header()
        return cls(gguf, header, sizes, tuple(checker.order(layer) for layer in range(sizes.layers)))

    @property
    def devices(self) -> SplitDevices:
        """Where the plan has what is no expert."""
        return self.header.devices or all_on_cpu(self.sizes.layers)

    def is_hot_shared(self, layer: int) -> bool:
        """Whether the plan has the shared expert of ``layer`` hot."""
        return bool(self.header.hot_shared) and self.header.hot_shared[layer]

    def close(self) -> None:
        """Let go of the file."""
        self.gguf.close()


def has_experts(gguf: ModelSource) -> bool:
    """Whether a split file is one of experts, by its version."""
    return gguf.metadata.get(names.KEY_VERSION) == VERSION


def _sizes(gguf: ModelSource) -> ExpertSizes:
    architecture = gguf.get("general.architecture", str)

    def size(key: str, default: int | None = None) -> int:
        whole = f"{architecture}.{key}"
        value = gguf.get(whole, int) if default is None else gguf.get(whole, int, default)
        if not 0 <= value < 1 << 31:
            raise errors.BadValue(gguf.path, f"metadata {whole!r} is {value}")
        return value

    neurons = size("expert_feed_forward_length", 0) or size("feed_forward_length")
    shared = size("expert_shared_feed_forward_length", 0)
    return ExpertSizes(
        size("block_count"), size("expert_count"), neurons, size("embedding_length"), shared > 0
    )


class _Checker(KeyReader):
    """Judges one file against the sizes that its model has."""

    def __init__(self, gguf: ModelSource, sizes: ExpertSizes) -> None:
        super().__init__(gguf, sizes.layers)
        self.sizes = sizes

    def header(self) -> ExpertsHeader:
        gguf = self.gguf
        version = gguf.get(names.KEY_VERSION, int)
        if version == names.VERSION:
            self.fail(names.KEY_VERSION, f"is {version}, that of models without experts; convert again")
        if version != VERSION:
            raise errors.UnsupportedVersion(
                gguf.path,
                f"is a split file of version {version}, this program reads {VERSION} for models with "
                "experts; convert again",
            )
        return ExpertsHeader(
            source_fingerprint=self.digest(names.KEY_SOURCE, gguf.get(names.KEY_SOURCE, str)),
            hot=self._counts(KEY_HOT, self.sizes.experts),
            hot_shared=self._hot_shared(),
            tool_version=gguf.get(names.KEY_TOOL_VERSION, str),
            corpus_hashes=tuple(
                self.digest(names.KEY_CORPUS_HASHES, text) for text in self.strings(names.KEY_CORPUS_HASHES)
            ),
            corpus_tokens=gguf.get(names.KEY_CORPUS_TOKENS, int),
            devices=self._devices(),
        )

    def order(self, layer: int) -> NDArray[np.int32]:
        """The order of one layer, whose matrices must be there, too."""
        for kind in names.KINDS:
            self.absent(source_name(layer, kind), "experts are in the order of the plan")
            self.gguf.tensor(
                experts_name(layer, kind), shape=self.sizes.shape(kind), types=frozenset(BLOCK_SHAPES)
            )
        return self.permutation(order_name(layer), self.sizes.experts, "experts")

    def _hot_shared(self) -> tuple[bool, ...]:
        if not self.sizes.shared:
            if KEY_HOT_SHARED in self.gguf.metadata:
                self.fail(KEY_HOT_SHARED, "is there, but the model has no shared expert")
            return ()
        return tuple(bool(value) for value in self._counts(KEY_HOT_SHARED, 1))

    def _devices(self) -> SplitDevices:
        devices = read_devices(self.gguf, self.sizes.layers)
        if "gpu" in devices.predictor:
            self.fail(KEY_PREDICTOR, "has a 'gpu', but models with experts have no predictors")
        return devices

    def _counts(self, key: str, most: int) -> tuple[int, ...]:
        counts = self.integers(key)
        for layer, count in enumerate(self.per_layer(key, counts)):
            if count > most:
                self.fail(key, f"has {count} for layer {layer}, expected 0 to {most}")
        return tuple(counts)


def declare_experts(writer: GGUFWriter, layer: int, sizes: ExpertSizes, types: tuple[int, ...]) -> None:
    """Declare the tensors of one layer, in the order in which their data has to be written: the order of
    experts, then gate, up and down of ``types``."""
    writer.declare(order_name(layer), TensorType.I32, (sizes.experts,))
    for kind, row_type in zip(names.KINDS, types, strict=True):
        writer.declare(experts_name(layer, kind), TensorType(row_type), sizes.shape(kind))
