"""Split files some of whose layers have experts, and others one FFN: what comes back, and one named error for
each way of being wrong."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from powerinfer_formats import errors
from powerinfer_formats import split_layout as names
from powerinfer_formats.block_types import TensorType
from powerinfer_formats.gguf_writer import GGUFWriter, ValueType
from powerinfer_formats.split import SplitFile
from powerinfer_formats.split_layout import (
    KINDS,
    SplitHeader,
    SplitPrediction,
    SplitSizes,
    bundle_layout,
    declare_experts,
    declare_split_layer,
)
from powerinfer_formats.split_thresholds import SplitThresholding

LAYERS, WIDTH, NEURONS, EXPERTS, EXPERT_NEURONS, GROUP = 3, 32, 12, 4, 8, 4
DENSE = (0, 2)
F32 = TensorType.F32
SIZES = SplitSizes(LAYERS, EXPERT_NEURONS, WIDTH, EXPERTS, True, frozenset(DENSE), NEURONS)
LAYOUT = bundle_layout(F32, F32, F32, WIDTH)
#: The dense layers are one expert each, with the source's matrices.
WHOLE = SplitHeader(
    source_fingerprint="ab" * 32,
    activation="",
    group=EXPERT_NEURONS,
    hot_neurons=(NEURONS, 3 * EXPERT_NEURONS, 0),
    modes=("dense",) * LAYERS,
    types=(),
    requantization_error=(),
    tool_version="0.1.0",
    experts=EXPERTS,
    hot_shared=(False, True, False),
    columns=True,
    dense=DENSE,
    dense_neurons=NEURONS,
)
#: Their neurons are sorted.
SORTED = replace(
    WHOLE,
    activation="relu",
    hot_neurons=(GROUP, 3 * EXPERT_NEURONS, NEURONS),
    modes=("gate-first", "dense", "dense"),
    types=((F32,) * 3, (), (F32,) * 3),
    requantization_error=(0.25, 0.0, 0.5),
    dense_group=GROUP,
)


@dataclass
class Parts:
    """What is written; a test changes one thing."""

    header: SplitHeader
    without_keys: set[str] = field(default_factory=set)
    without_tensors: set[str] = field(default_factory=set)
    entries: list[tuple[str, Any, ValueType]] = field(default_factory=list)


Change = Callable[[Parts], None]


class _Filter:
    """Passes on all entries but some."""

    def __init__(self, writer: GGUFWriter, without: set[str]) -> None:
        self.writer, self.without = writer, without

    def add(self, key: str, value: Any, kind: ValueType | None = None) -> None:
        if key not in self.without:
            self.writer.add(key, value, kind)


def write(path: Path, header: SplitHeader, change: Change | None = None) -> Path:
    parts = Parts(header)
    if change is not None:
        change(parts)
    with GGUFWriter(path, alignment=names.ALIGNMENT) as writer:
        filtered: Any = _Filter(writer, parts.without_keys)
        filtered.add("general.architecture", "dots1")
        for key, value in (
            ("block_count", LAYERS),
            ("expert_count", EXPERTS),
            ("expert_feed_forward_length", EXPERT_NEURONS),
            ("feed_forward_length", NEURONS),
            ("embedding_length", WIDTH),
        ):
            filtered.add(f"dots1.{key}", value, ValueType.UINT32)
        parts.header.write(filtered)
        for key, value, kind in parts.entries:
            writer.add(key, value, kind)
        made = []
        for name, shape in {
            "blk.1.ffn_gate_inp.weight": (EXPERTS, WIDTH),
            "blk.1.ffn_up_shexp.weight": (EXPERT_NEURONS, WIDTH),
        }.items():
            if name not in parts.without_tensors:
                made.append((name, writer.declare(name, F32, shape)))
        if SIZES.routed(1) and "experts" not in parts.without_tensors:
            declare_experts(writer, 1, SIZES, (F32,) * 3)
        rows = [layer for layer in parts.header.row_layers if f"rows {layer}" not in parts.without_tensors]
        for layer in rows:
            declare_split_layer(writer, layer, LAYOUT, neurons=NEURONS, hot=parts.header.hot_neurons[layer])
        for name, info in made:
            writer.write(name, bytes(info.nbytes))
        if "experts" not in parts.without_tensors:
            writer.write(names.expert_order_name(1), np.array([3, 1, 0, 2], "<i4").tobytes())
            for kind in KINDS:
                writer.write(names.experts_name(1, kind), bytes(4 * EXPERTS * EXPERT_NEURONS * WIDTH))
        for layer in rows:
            hot = parts.header.hot_neurons[layer]
            writer.write(names.order_name(layer), np.arange(NEURONS)[::-1].astype("<i4").tobytes())
            for kind in KINDS if hot else ():
                writer.write(names.hot_name(layer, kind), bytes(4 * hot * WIDTH))
            if hot < NEURONS:
                writer.write(names.bundle_name(layer), bytes((NEURONS - hot) * LAYOUT.record_bytes))
    return path


def header(**changes: Any) -> Change:
    def change(parts: Parts) -> None:
        parts.header = replace(parts.header, **changes)

    return change


def retyped(key: str, value: Any, kind: ValueType = ValueType.UINT32) -> Change:
    def change(parts: Parts) -> None:
        parts.without_keys.add(key)
        parts.entries.append((key, value, kind))

    return change


def without(name: str) -> Change:
    return lambda parts: parts.without_tensors.add(name)


@pytest.mark.parametrize("said", [WHOLE, SORTED])
def test_what_was_written_comes_back(said: SplitHeader, tmp_path: Path) -> None:
    split = SplitFile.open(write(tmp_path / "m.powerinfer.gguf", said))
    assert replace(split.header, devices=None) == said
    assert split.gguf.metadata[names.KEY_VERSION] == 4
    whole = said is WHOLE
    assert [(units.hot, units.group, units.shared_hot) for units in split.units] == [
        (1, 1, False) if whole else (GROUP, GROUP, False),
        (3, 1, True),
        (0, 1, False) if whole else (NEURONS, GROUP, False),
    ]
    order = [0] if whole else list(range(NEURONS))[::-1]
    assert [units.order.tolist() for units in split.units] == [order, [3, 1, 0, 2], order]
    assert [layer.index for layer in split.layers] == ([] if whole else [0, 2])
    assert split.layer(1) is None
    if not whole:
        layer = split.layer(0)
        assert layer is not None
        assert (layer.neurons, layer.hot_neurons, layer.mode) == (NEURONS, GROUP, "gate-first")
    assert split.gated
    split.close()


PREDICTION = SplitPrediction(("none",) * LAYERS, (), ())
THRESHOLDING = SplitThresholding(("none",) * LAYERS, (2.0, 2.0, 0.1, 0.1, 0.1))
FAULTS: list[tuple[SplitHeader, Change, type[errors.FormatError], str]] = [
    (WHOLE, retyped(names.KEY_VERSION, 2), errors.MissingTensor, "blk.0.ffn_gate_experts"),
    (WHOLE, retyped(names.KEY_VERSION, 1), errors.BadValue, "is 1, that of models without experts"),
    (WHOLE, retyped(names.KEY_VERSION, 3), errors.UnsupportedVersion, "version 3, this program reads 2 for"),
    (WHOLE, without("blk.1.ffn_gate_inp.weight"), errors.BadValue, "has 3 for layer 1, expected 0 to 1"),
    (WHOLE, header(hot_neurons=(2 * NEURONS, 0, 0)), errors.BadValue, "has 2 for layer 0, expected 0 to 1"),
    (WHOLE, header(hot_shared=(True, False, False)), errors.BadValue, "has 1 for layer 0, expected 0 to 0"),
    (WHOLE, without("experts"), errors.MissingTensor, "blk.1.ffn_gate_experts"),
    (WHOLE, retyped(names.KEY_GROUP, GROUP), errors.MissingKey, "powerinfer.hot_neurons"),
    (SORTED, without("rows 2"), errors.MissingTensor, "blk.2.ffn_"),
    (SORTED, header(hot_neurons=(3, 0, 0)), errors.BadValue, "has 3 for layer 0, expected a multiple of 4"),
    (
        SORTED,
        retyped(names.KEY_HOT_NEURONS, [0, 4, 0]),
        errors.BadValue,
        "has 4 for layer 1, expected a multiple of 4 up to 0",
    ),
    (
        SORTED,
        retyped(names.KEY_HOT_EXPERTS, [1, 3, 0]),
        errors.BadValue,
        "has 1 for layer 0, expected 0 to 0",
    ),
    (
        SORTED,
        header(modes=("dense", "predicted", "dense")),
        errors.BadValue,
        "has 'predicted' for layer 1, known are dense, gate-first",
    ),
    (
        SORTED,
        header(types=((F32,) * 3,) * 3),
        errors.BadValue,
        r"has 9 values, expected 3 \(without gate: 2\) for each of 2 layers",
    ),
    (SORTED, header(dense_group=NEURONS + 1), errors.BadValue, "is 13, expected 1 to 12"),
    (SORTED, header(prediction=PREDICTION), errors.BadValue, "neither predictors nor thresholds"),
    (SORTED, header(thresholding=THRESHOLDING), errors.BadValue, "neither predictors nor thresholds"),
]


@pytest.mark.parametrize(("said", "change", "kind", "why"), FAULTS)
def test_every_fault_has_its_error(
    said: SplitHeader, change: Change, kind: type[errors.FormatError], why: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=why):
        SplitFile.open(write(tmp_path / "m.gguf", said, change))
