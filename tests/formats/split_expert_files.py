"""A small split file of experts, written through the writer's own helpers, with room for one fault."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from powerinfer_formats.block_types import TensorType
from powerinfer_formats.gguf_writer import GGUFWriter, ValueType
from powerinfer_formats.split_devices import SplitDevices
from powerinfer_formats.split_layout import (
    ALIGNMENT,
    KINDS,
    SplitHeader,
    SplitSizes,
    declare_experts,
    expert_order_name,
    experts_name,
)

SIZES = SplitSizes(layers=2, experts=5, neurons=32, width=64, shared=True)
TYPES = (TensorType.Q4_0, TensorType.Q4_0, TensorType.Q8_0)
HEADER = SplitHeader(
    source_fingerprint="ab" * 32,
    activation="",
    group=32,
    hot_neurons=(2 * 32, 5 * 32),
    modes=("dense", "dense"),
    types=(),
    requantization_error=(),
    experts=5,
    hot_shared=(True, False),
    tool_version="0.1.0",
    corpus_hashes=("cd" * 32,),
    corpus_tokens=1000,
    devices=SplitDevices(("gpu", "cpu"), ("cpu", "cpu"), "gpu"),
)
ORDERS = ([3, 0, 4, 1, 2], [4, 3, 2, 1, 0])


@dataclass
class ExpertParts:
    """What is written; a test changes one thing."""

    header: SplitHeader = HEADER
    sizes: SplitSizes = SIZES
    orders: list[list[int]] = field(default_factory=lambda: [list(order) for order in ORDERS])
    types: tuple[TensorType, ...] = TYPES
    without_keys: set[str] = field(default_factory=set)
    extra_entries: list[tuple[str, Any, ValueType | None]] = field(default_factory=list)
    extra_tensors: list[tuple[str, int, tuple[int, ...]]] = field(default_factory=list)


class _Filter:
    """Passes on all entries but some."""

    def __init__(self, writer: GGUFWriter, without: set[str]) -> None:
        self.writer, self.without = writer, without

    def add(self, key: str, value: Any, kind: ValueType | None = None) -> None:
        if key not in self.without:
            self.writer.add(key, value, kind)


def write_split_experts(path: Path, change: Callable[[ExpertParts], None] | None = None) -> Path:
    parts = ExpertParts()
    if change is not None:
        change(parts)
    with GGUFWriter(path, alignment=ALIGNMENT) as writer:
        filtered: Any = _Filter(writer, parts.without_keys)
        filtered.add("general.architecture", "qwen2moe")
        for key, value in (
            ("block_count", SIZES.layers),
            ("expert_count", SIZES.experts),
            ("expert_feed_forward_length", SIZES.neurons),
            ("expert_shared_feed_forward_length", 96),
            ("embedding_length", SIZES.width),
        ):
            filtered.add(f"qwen2moe.{key}", value, ValueType.UINT32)
        parts.header.write(filtered)
        for key, value, kind in parts.extra_entries:
            writer.add(key, value, kind)
        for layer in range(SIZES.layers):
            declare_experts(writer, layer, parts.sizes, parts.types)
        made = [(name, writer.declare(name, kind, shape)) for name, kind, shape in parts.extra_tensors]
        for layer in range(SIZES.layers):
            order = np.array(parts.orders[layer], "<i4")
            writer.write(expert_order_name(layer), order.tobytes())
            for kind in KINDS:
                writer.write(experts_name(layer, kind), matrices(parts, layer, kind).tobytes())
        for name, info in made:
            writer.write(name, bytes(info.nbytes))
    return path


def matrices(parts: ExpertParts, layer: int, kind: str) -> np.ndarray:
    """Random bytes, uint8 [experts, bytes of a matrix]."""
    _, rows, columns = parts.sizes.matrices(kind)
    row_type = parts.types[KINDS.index(kind)]
    nbytes = rows * columns // 32 * (34 if row_type == TensorType.Q8_0 else 18)
    return np.random.default_rng(layer).integers(0, 256, (parts.sizes.experts, nbytes), np.uint8)
