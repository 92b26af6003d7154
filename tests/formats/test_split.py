from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gguf_bytes import VALID
from powerinfer_formats import errors
from powerinfer_formats import split_layout as names
from powerinfer_formats.block_types import TensorType
from powerinfer_formats.gguf_reader import GGUFFile
from powerinfer_formats.gguf_writer import ValueType
from powerinfer_formats.split import SplitFile, bundle_layout
from powerinfer_formats.split_devices import (
    KEY_ATTENTION,
    KEY_HEAD,
    KEY_PREDICTOR,
    SplitDevices,
    all_on_cpu,
)
from powerinfer_formats.split_layout import SplitPrediction, SplitSizes
from powerinfer_formats.split_predictors import SplitLowRank, SplitResidualRelu, SplitSigns
from split_files import (
    HEADER,
    HOT,
    LAYERS,
    LAYOUT,
    NEURONS,
    TYPES,
    WIDTH,
    Parts,
    order,
    source_rows,
    with_header,
    write_split,
)

Change = Callable[[Parts], None]


def test_a_record_is_three_padded_rows() -> None:
    """Q4_1 takes 20 bytes for 32 values, Q8_0 34: rows of 64 values have 40, 40 and 68 bytes."""
    assert LAYOUT.row_sizes == (40, 40, 68)
    assert LAYOUT.offsets == (0, 64, 128)
    assert LAYOUT.record_bytes == 256
    gate, up, down = (np.full((1, size), value, np.uint8) for size, value in ((40, 1), (40, 2), (68, 3)))
    expected = b"\x01" * 40 + b"\x00" * 24 + b"\x02" * 40 + b"\x00" * 24 + b"\x03" * 68 + b"\x00" * 60
    assert LAYOUT.pack(gate, up, down).tobytes() == expected


def test_where_units_are_is_read_as_it_was_written(tmp_path: Path) -> None:
    """A file with all of them on the CPU says nothing, and one key needs the others."""
    devices = SplitDevices(("cpu", "gpu", "cpu"), ("cpu", "cpu", "gpu"), "gpu")
    split = SplitFile.open(write_split(tmp_path / "some.gguf", with_header(devices=devices)))
    assert split.devices == devices
    for said in (None, all_on_cpu(3)):
        split = SplitFile.open(write_split(tmp_path / "none.gguf", with_header(devices=said)))
        assert split.devices == all_on_cpu(3)
        assert not {KEY_ATTENTION, KEY_PREDICTOR, KEY_HEAD} & set(split.gguf.metadata)

    def lonely(parts: Parts) -> None:
        parts.extra_entries.append((KEY_HEAD, "gpu", None))

    with pytest.raises(errors.MissingKey, match="attention_device"):
        SplitFile.open(write_split(tmp_path / "lonely.gguf", lonely))


@pytest.mark.parametrize("width", [256, 576, 4096])
@pytest.mark.parametrize("types", [(0, 1, 30), (2, 3, 8), (8, 8, 8)])
def test_rows_in_a_record_do_not_overlap_and_are_aligned(types: tuple[int, int, int], width: int) -> None:
    layout = bundle_layout(*types, width)
    ends = [start + size for start, size in zip(layout.offsets, layout.row_sizes, strict=True)]
    following = [*layout.offsets[1:], layout.record_bytes]
    assert all(0 <= after - end < 64 for end, after in zip(ends, following, strict=True))
    assert all(start % 64 == 0 for start in following)


def test_a_width_that_is_no_whole_block_has_no_layout() -> None:
    with pytest.raises(ValueError, match="Q8_0 blocks"):
        bundle_layout(0, 0, 8, 48)


@pytest.fixture
def split(tmp_path: Path) -> SplitFile:
    return SplitFile.open(write_split(tmp_path / "m.powerinfer.gguf"))


def test_the_header_comes_back(split: SplitFile) -> None:
    assert split.header == HEADER
    assert split.source_fingerprint == HEADER.source_fingerprint
    assert (split.modes, split.group, split.hot_neurons) == (HEADER.modes, 4, HOT)


@pytest.mark.parametrize("layer", range(LAYERS))
def test_rows_come_back_from_any_range(split: SplitFile, layer: int) -> None:
    view, rows = split.layer(layer), source_rows(layer)
    assert view.order.tolist() == order(layer)
    assert tuple(view.type_of(kind) for kind in view.kinds) == TYPES
    assert (view.neurons, view.hot_neurons, view.width, view.mode) == (
        12,
        HOT[layer],
        64,
        HEADER.modes[layer],
    )
    assert view.neuron_bytes == 148
    for kind in names.KINDS:
        for first in range(NEURONS + 1):
            for last in range(first, NEURONS + 1):
                assert np.array_equal(view.rows(kind, first, last), rows[kind][first:last])


@pytest.mark.parametrize(("first", "last"), [(-1, 2), (3, 2), (0, 13), (13, 13)])
def test_rows_beyond_the_layer(split: SplitFile, first: int, last: int) -> None:
    with pytest.raises(IndexError, match="of 12"):
        split.layer(0).rows("up", first, last)


def test_tensors_of_no_neurons_are_left_out(split: SplitFile) -> None:
    found = set(split.gguf.tensors)
    assert names.bundle_name(0) in found
    assert names.hot_name(1, "gate") not in found
    assert names.bundle_name(2) not in found


def test_rows_are_aligned_in_the_file(split: SplitFile) -> None:
    for layer in range(LAYERS):
        for name in (names.bundle_name(layer), names.hot_name(layer, "gate")):
            if name in split.gguf.tensors:
                assert split.gguf.info(name).offset % 64 == 0


def test_a_source_model_is_not_a_split_file(tmp_path: Path, smollm2: Path) -> None:
    with GGUFFile.open(smollm2) as source:
        assert SplitFile.read(source, SplitSizes(layers=30, neurons=1536, width=576)) is None
    with pytest.raises(errors.NotASplitFile, match="powerinfer convert"):
        SplitFile.open(smollm2)
    plain = tmp_path / "plain.gguf"
    plain.write_bytes(VALID)
    with pytest.raises(errors.MissingKey, match="block_count"):
        SplitFile.open(plain)


def _without(*dropped: str) -> Change:
    return lambda parts: parts.without.update(dropped)


def _retyped(key: str, value: object, kind: ValueType) -> Change:
    def change(parts: Parts) -> None:
        parts.without.add(key)
        parts.extra_entries.append((key, value, kind))

    return change


def _tensor(name: str) -> Change:
    return lambda parts: parts.extra_tensors.append((name, TensorType.F32, (4,)))


def _columns(layer: int, neurons: int = NEURONS, *, columns: bool = False) -> Change:
    """The down projection of the source in float32; ``columns``: the header announces such."""

    def change(parts: Parts) -> None:
        parts.header = replace(parts.header, columns=columns)
        parts.extra_tensors.append((names.columns_name(layer), TensorType.F32, (WIDTH, neurons)))

    return change


def _order(layer: int, values: list[int]) -> Change:
    return lambda parts: parts.orders.update({layer: values})


def _predictor(
    rank: int,
    width: int = WIDTH,
    neurons: int = NEURONS,
    thresholds: list[float] | None = None,
    without: int | None = None,
    kinds_written: tuple[str, ...] | None = None,
    shares: tuple[tuple[float, ...], tuple[float, ...]] = ((), ()),
) -> Change:
    """A predictor in layer 1, ``without`` one of its tensors."""

    def change(parts: Parts) -> None:
        kinds = ("none", "low-rank", "none") if kinds_written is None else kinds_written
        if kinds:
            parts.header = replace(parts.header, prediction=SplitPrediction(kinds, *shares))
        tensor_names = names.predictor_names(1)
        for index, shape in enumerate(((rank, width), (neurons, rank))):
            if index != without:
                parts.extra_tensors.append((tensor_names[index], TensorType.F32, shape))
        parts.thresholds[1] = [0.5] * NEURONS if thresholds is None else thresholds

    return change


def _signs(row: int) -> Change:
    """A sign predictor in layer 1, with rows of so many bytes."""

    def change(parts: Parts) -> None:
        parts.header = replace(parts.header, prediction=SplitPrediction(("none", "sign", "none"), (), ()))
        parts.extra_tensors.append((names.predictor_names(1, "sign")[0], TensorType.I8, (NEURONS, row)))
        parts.thresholds[1] = [0.5] * NEURONS

    return change


_ASCENDING = list(range(NEURONS))
_U32, _F32 = ValueType.UINT32, ValueType.FLOAT32
_Q4 = TensorType.Q4_1

FAULTS: list[tuple[str, Change, type[errors.FormatError], str]] = [
    (
        "version 5",
        _retyped(names.KEY_VERSION, 5, _U32),
        errors.UnsupportedVersion,
        "version 5.*reads 1 and 3.*convert again",
    ),
    ("version 4", _retyped(names.KEY_VERSION, 4, _U32), errors.MissingKey, "expert_count"),
    ("columns in version 1", _columns(0), errors.UnexpectedTensor, "version 1"),
    ("columns not dense", _columns(1, columns=True), errors.UnexpectedTensor, "gate-first"),
    ("columns of another shape", _columns(0, NEURONS + 1, columns=True), errors.WrongShape, "columns"),
    ("no source", _without(names.KEY_SOURCE), errors.MissingKey, "source_fingerprint"),
    ("no group", _without(names.KEY_GROUP), errors.MissingKey, "group"),
    ("no hot", _without(names.KEY_HOT_NEURONS), errors.MissingKey, "hot_neurons"),
    ("no mode", _without(names.KEY_MODE), errors.MissingKey, "mode"),
    ("no types", _without(names.KEY_FFN_TYPES), errors.MissingKey, "ffn_types"),
    ("no error", _without(names.KEY_REQUANTIZATION_ERROR), errors.MissingKey, "requantization"),
    ("no activation", _without(names.KEY_ACTIVATION), errors.MissingKey, "activation"),
    ("no corpus", _without(names.KEY_CORPUS_HASHES), errors.MissingKey, "corpus"),
    ("no tokens", _without(names.KEY_CORPUS_TOKENS), errors.MissingKey, "corpus_tokens"),
    ("source short", with_header(source_fingerprint="ab"), errors.BadValue, "64 hexadecimal"),
    ("source upper", with_header(source_fingerprint="AB" * 32), errors.BadValue, "64 hexadecimal"),
    ("corpus short", with_header(corpus_hashes=("x",)), errors.BadValue, "64 hexadecimal"),
    ("group 0", with_header(group=0), errors.BadValue, "is 0"),
    ("group 13", with_header(group=13), errors.BadValue, "1 to 12"),
    ("hot no group", with_header(hot_neurons=(5, 0, 12)), errors.BadValue, "multiple of 4"),
    ("hot too many", with_header(hot_neurons=(16, 0, 12)), errors.BadValue, "has 16 for layer 0"),
    ("hot two layers", with_header(hot_neurons=(4, 0)), errors.BadValue, "each of 3 layers"),
    (
        "hot as i32",
        _retyped(names.KEY_HOT_NEURONS, [4, 0, 12], ValueType.INT32),
        errors.WrongKeyType,
        "UINT32",
    ),
    ("hot other shape", with_header(hot_neurons=(8, 0, 12)), errors.WrongShape, "ffn_gate_hot"),
    ("hot none", with_header(hot_neurons=(0, 0, 12)), errors.UnexpectedTensor, "ffn_gate_hot"),
    ("hot all", with_header(hot_neurons=(12, 0, 12)), errors.WrongShape, "ffn_gate_hot"),
    ("cold left", with_header(hot_neurons=(4, 0, 8)), errors.WrongShape, "blk.2.ffn_gate_hot"),
    ("mode unknown", with_header(modes=("dense", "fast", "dense")), errors.BadValue, "'fast' for layer 1"),
    ("mode two layers", with_header(modes=("dense",) * 2), errors.BadValue, "each of 3 layers"),
    ("types one layer", with_header(types=(TYPES,)), errors.BadValue, r"3 \(without gate: 2\) for each of 3"),
    ("types no gate", with_header(types=(TYPES[1:],) * 3), errors.UnexpectedTensor, "ffn_gate_hot.*no gate"),
    ("types unknown", _retyped(names.KEY_FFN_TYPES, [99] * 9, _U32), errors.BadValue, "type 99"),
    (
        "types no block",
        with_header(types=((TensorType.Q4_K, _Q4, _Q4),) * 3),
        errors.BadValue,
        "suit layer 0",
    ),
    (
        "types of hot",
        with_header(types=((TensorType.Q4_0, _Q4, _Q4),) * 3),
        errors.WrongType,
        "is of type Q4_1",
    ),
    (
        "types of cold",
        with_header(types=(TYPES, (_Q4, _Q4, TensorType.F32), TYPES)),
        errors.WrongShape,
        "bundle",
    ),
    ("error NaN", with_header(requantization_error=(0.0, float("nan"), 0.0)), errors.BadValue, "finite"),
    ("error negative", with_header(requantization_error=(0.0, -1.0, 0.0)), errors.BadValue, "negative"),
    ("error two layers", with_header(requantization_error=(0.0, 1.0)), errors.BadValue, "each of 3"),
    (
        "error as f64",
        _retyped(names.KEY_REQUANTIZATION_ERROR, [0.0] * 3, ValueType.FLOAT64),
        errors.WrongKeyType,
        "FLOAT32",
    ),
    (
        "attention of two layers",
        with_header(devices=SplitDevices(("gpu",) * 2, ("cpu",) * 3, "cpu")),
        errors.BadValue,
        "attention_device.*each of 3 layers",
    ),
    (
        "predictor on a tpu",
        with_header(devices=SplitDevices(("gpu",) * 3, ("tpu",) * 3, "cpu")),
        errors.BadValue,
        "predictor_device.*cpu, gpu",
    ),
    (
        "head nowhere",
        with_header(devices=SplitDevices(("gpu",) * 3, ("cpu",) * 3, "none")),
        errors.BadValue,
        "head_device' is 'none', expected cpu or gpu",
    ),
    ("no order", _without(names.order_name(0)), errors.MissingTensor, "blk.0.ffn_order"),
    ("no hot rows", _without(names.hot_name(0, "up")), errors.MissingTensor, "blk.0.ffn_up_hot"),
    ("no bundle", _without(names.bundle_name(1)), errors.MissingTensor, "blk.1.ffn_cold"),
    ("order twice", _order(0, [0, *_ASCENDING[:-1]]), errors.NotAPermutation, "11 is missing"),
    (
        "order negative",
        _order(1, [-1, *_ASCENDING[1:]]),
        errors.NotAPermutation,
        "blk.1.ffn_order.*0 is missing",
    ),
    ("order beyond", _order(2, [*_ASCENDING[:-1], 12]), errors.NotAPermutation, "11 is missing"),
    ("order huge", _order(2, [*_ASCENDING[:-1], 2**31 - 1]), errors.NotAPermutation, "11 is missing"),
    ("source matrix", _tensor("blk.1.ffn_up.weight"), errors.UnexpectedTensor, "blk.1.ffn_up.weight"),
    ("hot where none", _tensor(names.hot_name(1, "gate")), errors.UnexpectedTensor, "no neurons there"),
    (
        "predictor alone",
        _predictor(rank=8, without=1),
        errors.MissingTensor,
        "blk.1.predictor_out.weight.*predictor of layer 1",
    ),
    (
        "predicted without predictor",
        with_header(modes=("dense", "predicted", "dense")),
        errors.BadValue,
        "layer 1, which has no predictor",
    ),
    ("predictor of no kind", _predictor(rank=8, kinds_written=()), errors.UnexpectedTensor, "is 'none'"),
    (
        "unknown kind",
        _predictor(rank=8, kinds_written=("none", "oracle", "none")),
        errors.BadValue,
        "has 'oracle' for layer 1, known are none, low-rank, residual-relu, sign",
    ),
    (
        "other kind",
        _predictor(rank=8, kinds_written=("none", "sign", "none")),
        errors.UnexpectedTensor,
        "predictor_in.weight', but the predictor of layer 1 is 'sign'",
    ),
    ("signs too long", _signs(9), errors.WrongShape, "predictor_signs"),
    ("kinds short", _predictor(rank=8, kinds_written=("low-rank",)), errors.BadValue, "has 1 values"),
    ("recall above 1", _predictor(rank=8, shares=((1, 2, 1), (1, 1, 1))), errors.BadValue, "share above 1"),
    ("recall short", _predictor(rank=8, shares=((1, 1), (1, 1))), errors.BadValue, "has 2 values"),
    ("no density", _predictor(rank=8, shares=((1, 1, 1), ())), errors.BadValue, "not of the same layers"),
    (
        "cost of no predictors",
        _retyped(names.KEY_PREDICTION_COST, np.ones(4, np.float32), _F32),
        errors.BadValue,
        "no predictor is",
    ),
    ("predictor too wide", _predictor(rank=WIDTH + 1), errors.WrongShape, "65 rows, expected 1 to 64"),
    ("predictor width", _predictor(rank=8, width=32), errors.WrongShape, "blk.1.predictor_in"),
    ("predictor neurons", _predictor(rank=8, neurons=13), errors.WrongShape, "blk.1.predictor_out"),
    ("thresholds", _predictor(rank=8, thresholds=[0.0] * 11), errors.WrongShape, "predictor_threshold"),
    (
        "threshold NaN",
        _predictor(rank=8, thresholds=[0.0] * 11 + [float("nan")]),
        errors.BadValue,
        "not finite",
    ),
    ("cold where none", _tensor(names.bundle_name(2)), errors.UnexpectedTensor, "no neurons there"),
]


@pytest.mark.parametrize(("change", "error", "words"), [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS])
def test_each_fault_has_its_error(
    tmp_path: Path, change: Change, error: type[errors.FormatError], words: str
) -> None:
    path = write_split(tmp_path / "m.powerinfer.gguf", change)
    with pytest.raises(errors.FormatError, match=words) as caught:
        SplitFile.open(path)
    assert type(caught.value) is error


def test_a_predictor_comes_back(tmp_path: Path) -> None:
    with_predictor = SplitFile.open(write_split(tmp_path / "m.powerinfer.gguf", _predictor(rank=8)))
    assert with_predictor.layer(0).predictor is None
    predictor = with_predictor.layer(1).predictor
    assert isinstance(predictor, SplitLowRank)
    assert predictor.rank == 8
    assert predictor.types == (TensorType.F32, TensorType.F32)
    assert predictor.inward.shape == (8, 4 * WIDTH)
    assert predictor.outward.shape == (NEURONS, 4 * 8)
    np.testing.assert_array_equal(predictor.threshold, np.full(NEURONS, 0.5, np.float32))


def test_the_down_projection_of_a_dense_layer_comes_back(tmp_path: Path) -> None:
    split = SplitFile.open(write_split(tmp_path / "m.powerinfer.gguf", _columns(2, columns=True)))
    columns = split.layer(2).columns
    assert columns is not None
    assert (columns.row_type, columns.rows.shape) == (TensorType.F32, (WIDTH, 4 * NEURONS))
    assert split.layer(0).columns is None
    assert split.header == replace(HEADER, columns=True)


def test_a_predictor_of_the_original_kind_comes_back(tmp_path: Path) -> None:
    written = _predictor(rank=8, kinds_written=("none", "residual-relu", "none"))
    predictor = SplitFile.open(write_split(tmp_path / "m.powerinfer.gguf", written)).layer(1).predictor
    assert isinstance(predictor, SplitResidualRelu)
    assert (predictor.kind, predictor.residual, predictor.relu) == ("residual-relu", True, True)
    assert predictor.rank == 8


@pytest.mark.parametrize(("layers", "neurons", "width"), [(2, 12, 64), (4, 12, 64), (3, 16, 64), (3, 12, 32)])
def test_the_split_must_suit_the_model(split: SplitFile, layers: int, neurons: int, width: int) -> None:
    with pytest.raises(errors.FormatError):
        SplitFile.read(split.gguf, SplitSizes(layers=layers, neurons=neurons, width=width))
    assert SplitFile.read(split.gguf, SplitSizes(layers=LAYERS, neurons=NEURONS, width=WIDTH)) is not None


def test_signs_come_back(tmp_path: Path) -> None:
    predictor = SplitFile.open(write_split(tmp_path / "m.gguf", _signs(WIDTH // 8))).layer(1).predictor
    assert isinstance(predictor, SplitSigns)
    assert predictor.signs.shape == (NEURONS, WIDTH // 8)
    assert predictor.nbytes == NEURONS * (WIDTH // 8 + 4)


def test_what_a_file_says_of_its_predictors(tmp_path: Path) -> None:
    shares = ((1.0, 0.75, 1.0), (0.5, 0.25, 0.5))
    said = SplitPrediction(("none", "low-rank", "none"), *shares, cost=(20.0, 20.5, 0.25, 0.0))

    def change(parts: Parts) -> None:
        _predictor(rank=8)(parts)
        parts.header = replace(parts.header, prediction=said)

    assert SplitFile.open(write_split(tmp_path / "m.gguf", change)).header.prediction == said
