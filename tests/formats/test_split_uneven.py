"""Split files whose layers have FFNs of several sizes, or none: what comes back, and what is refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from powerinfer_formats import errors
from powerinfer_formats import split_layout as names
from powerinfer_formats.block_types import TensorType
from powerinfer_formats.gguf_writer import GGUFWriter, ValueType
from powerinfer_formats.split import SplitFile
from powerinfer_formats.split_layout import SplitHeader, bundle_layout, declare_split_layer

WIDTH, EACH, HOT, GROUP = 32, (12, 0, 7), (8, 0, 7), 4
F32 = TensorType.F32
LAYOUT = bundle_layout(None, F32, F32, WIDTH)
HEADER = SplitHeader(
    source_fingerprint="ab" * 32,
    activation="relu2",
    group=GROUP,
    hot_neurons=HOT,
    modes=("gate-first", "dense", "dense"),
    types=((F32, F32), (), (F32, F32)),
    requantization_error=(0.25, 0.0, 0.5),
    tool_version="0.1.0",
)


def write(
    path: Path, header: SplitHeader = HEADER, each: tuple[int, ...] = EACH, spare: str | None = None
) -> Path:
    with GGUFWriter(path, alignment=names.ALIGNMENT) as writer:
        writer.add("general.architecture", "nemotron_h")
        writer.add("nemotron_h.block_count", 3, ValueType.UINT32)
        writer.add("nemotron_h.embedding_length", WIDTH, ValueType.UINT32)
        writer.add("nemotron_h.feed_forward_length", list(each), ValueType.UINT32)
        header.write(writer)
        fed = [(layer, EACH[layer], HOT[layer]) for layer in range(3) if EACH[layer]]
        for layer, neurons, hot in fed:
            declare_split_layer(writer, layer, LAYOUT, neurons=neurons, hot=hot)
        if spare is not None:
            writer.declare(spare, TensorType.I32, (4,))
        for layer, neurons, hot in fed:
            writer.write(names.order_name(layer), np.arange(neurons, dtype="<i4")[::-1].copy())
            for kind in LAYOUT.kinds:
                writer.write(names.hot_name(layer, kind), np.zeros((hot, WIDTH), "<f4"))
            if neurons > hot:
                rows = np.zeros((neurons - hot, 4 * WIDTH), np.uint8)
                writer.write(names.bundle_name(layer), LAYOUT.pack(rows, rows))
        if spare is not None:
            writer.write(spare, np.arange(4, dtype="<i4"))
    return path


def test_each_layer_has_its_own_neurons(tmp_path: Path) -> None:
    split = SplitFile.open(write(tmp_path / "model.gguf"))
    assert [layer.neurons for layer in split.layers] == [12, 7]
    assert split.layer(1) is None
    assert [(len(units.order), units.hot) for units in split.units] == [(12, 8), (0, 0), (7, 7)]
    assert split.header == replace(HEADER, devices=split.devices)
    assert not split.gated
    split.close()


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"header": replace(HEADER, hot_neurons=(8, 0, 8))}, errors.BadValue, "has 8 for layer 2"),
        (
            {"header": replace(HEADER, modes=("gate-first", "gate-first", "dense"))},
            errors.BadValue,
            "'gate-first' for layer 1",
        ),
        ({"header": replace(HEADER, types=((F32, F32),) * 4)}, errors.BadValue, "has 8 values"),
        ({"each": (12, 0)}, errors.BadValue, "does not say the neurons of each layer"),
        ({"each": (0, 0, 0)}, errors.BadValue, "does not say the neurons of each layer"),
        ({"each": (12, 0, 8)}, errors.BadValue, "has 7 for layer 2"),
        ({"each": (12, 7, 7)}, errors.BadValue, "has 4 values"),
        ({"spare": "blk.1.ffn_order"}, errors.UnexpectedTensor, "blk.1.ffn_order"),
    ],
)
def test_what_does_not_fit_is_refused(
    changes: dict[str, object], error: type[Exception], text: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "model.gguf", **changes)  # type: ignore[arg-type]
    with pytest.raises(error, match=text):
        SplitFile.open(path)
