"""A small split file, written through the writer's own helpers, with room for one fault at a time."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from powerinfer_formats.block_types import TensorType
from powerinfer_formats.gguf_writer import GGUFWriter, ValueType
from powerinfer_formats.split_devices import all_on_cpu
from powerinfer_formats.split_layout import (
    ALIGNMENT,
    KINDS,
    SplitHeader,
    bundle_layout,
    bundle_name,
    declare_split_layer,
    hot_name,
    order_name,
    predictor_names,
)
from powerinfer_formats.split_thresholds import threshold_name

NEURONS, WIDTH, LAYERS = 12, 64, 3
HOT = (4, 0, 12)
TYPES = (TensorType.Q4_1, TensorType.Q4_1, TensorType.Q8_0)
LAYOUT = bundle_layout(*TYPES, WIDTH)
HEADER = SplitHeader(
    source_fingerprint="ab" * 32,
    activation="silu",
    group=4,
    hot_neurons=HOT,
    modes=("dense", "gate-first", "dense"),
    types=(TYPES,) * LAYERS,
    requantization_error=(0.0, 0.25, 0.5),
    tool_version="0.1.0",
    corpus_hashes=("cd" * 32,),
    corpus_tokens=1000,
    devices=all_on_cpu(LAYERS),
)


@dataclass
class Parts:
    """What is written; a test changes one thing."""

    header: SplitHeader = HEADER
    extra_entries: list[tuple[str, Any, ValueType | None]] = field(default_factory=list)
    extra_tensors: list[tuple[str, int, tuple[int, ...]]] = field(default_factory=list)
    without: set[str] = field(default_factory=set)
    orders: dict[int, list[int]] = field(default_factory=dict)
    thresholds: dict[int, list[float]] = field(default_factory=dict)
    factor_thresholds: dict[int, list[float]] = field(default_factory=dict)


def source_rows(layer: int) -> dict[str, np.ndarray]:
    """Rows of all neurons of a layer in hot-to-cold order: uint8 [NEURONS, row bytes] per kind."""
    rng = np.random.default_rng(layer)
    return {
        kind: rng.integers(0, 256, (NEURONS, size), np.uint8)
        for kind, size in zip(KINDS, LAYOUT.row_sizes, strict=True)
    }


def order(layer: int) -> list[int]:
    permutation: list[int] = np.random.default_rng(100 + layer).permutation(NEURONS).tolist()
    return permutation


def write_split(path: Path, change: Callable[[Parts], None] | None = None) -> Path:
    parts = Parts()
    if change is not None:
        change(parts)
    with GGUFWriter(path, alignment=ALIGNMENT) as writer:
        writer.add("general.architecture", "llama")
        for key, value in (
            ("block_count", LAYERS),
            ("feed_forward_length", NEURONS),
            ("embedding_length", WIDTH),
        ):
            writer.add(f"llama.{key}", value, ValueType.UINT32)
        parts.header.write(_Filter(writer, parts.without))  # type: ignore[arg-type]
        for key, value, kind in parts.extra_entries:
            writer.add(key, value, kind)
        written: list[tuple[str, bytes]] = []
        for layer in range(LAYERS):
            written += _declare_layer(writer, layer, parts)
        for layer, values in parts.thresholds.items():
            name = predictor_names(layer)[2]
            writer.declare(name, TensorType.F32, (len(values),))
            written.append((name, np.array(values, "<f4").tobytes()))
        for layer, values in parts.factor_thresholds.items():
            name = threshold_name(layer)
            writer.declare(name, TensorType.F32, (len(values),))
            written.append((name, np.array(values, "<f4").tobytes()))
        for name, kind, shape in parts.extra_tensors:
            info = writer.declare(name, kind, shape)
            written.append((name, bytes(info.nbytes)))
        for name, data in written:
            writer.write(name, data)
    return path


class _Filter:
    """Passes on all entries but some."""

    def __init__(self, writer: GGUFWriter, without: set[str]) -> None:
        self.writer, self.without = writer, without

    def add(self, key: str, value: Any, kind: ValueType | None = None) -> None:
        if key not in self.without:
            self.writer.add(key, value, kind)


def _declare_layer(writer: GGUFWriter, layer: int, parts: Parts) -> list[tuple[str, bytes]]:
    rows, hot = source_rows(layer), HOT[layer]
    if not parts.without & {order_name(layer), bundle_name(layer), hot_name(layer, "up")}:
        declare_split_layer(writer, layer, LAYOUT, neurons=NEURONS, hot=hot)
    else:
        _declare_some(writer, layer, hot, parts.without)
    permutation = parts.orders.get(layer, order(layer))
    data = [(order_name(layer), np.array(permutation, "<i4").tobytes())]
    if hot:
        data += [(hot_name(layer, kind), rows[kind][:hot].tobytes()) for kind in KINDS]
    if hot < NEURONS:
        data.append((bundle_name(layer), LAYOUT.pack(*(rows[kind][hot:] for kind in KINDS)).tobytes()))
    return [(name, content) for name, content in data if name not in parts.without]


def _declare_some(writer: GGUFWriter, layer: int, hot: int, without: set[str]) -> None:
    wanted: list[tuple[str, int, tuple[int, ...]]] = [(order_name(layer), TensorType.I32, (NEURONS,))]
    if hot:
        wanted += [(hot_name(layer, k), t, (hot, WIDTH)) for k, t in zip(KINDS, TYPES, strict=True)]
    if hot < NEURONS:
        wanted.append((bundle_name(layer), TensorType.I8, (NEURONS - hot, LAYOUT.record_bytes)))
    for name, kind, shape in wanted:
        if name not in without:
            writer.declare(name, kind, shape)


def with_header(**changes: Any) -> Callable[[Parts], None]:
    """A change of the header's fields."""

    def change(parts: Parts) -> None:
        parts.header = replace(parts.header, **changes)

    return change
