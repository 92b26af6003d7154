"""Split files of experts: what comes back, and one named error for each way of being wrong."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from powerinfer_formats import errors, split_devices
from powerinfer_formats import split_layout as names
from powerinfer_formats.block_types import TensorType
from powerinfer_formats.gguf_reader import GGUFFile
from powerinfer_formats.gguf_writer import ValueType
from powerinfer_formats.split import SplitFile
from powerinfer_formats.split_devices import SplitDevices
from powerinfer_formats.split_layout import SplitSizes
from split_expert_files import HEADER, ORDERS, SIZES, ExpertParts, write_split_experts
from split_files import with_header, write_split

Change = Callable[[ExpertParts], None]


def hot(*experts: int) -> Change:
    return header(hot_neurons=tuple(count * SIZES.neurons for count in experts))


def header(**changes: Any) -> Change:
    def change(parts: ExpertParts) -> None:
        parts.header = replace(parts.header, **changes)

    return change


def sizes(**changes: Any) -> Change:
    def change(parts: ExpertParts) -> None:
        parts.sizes = replace(parts.sizes, **changes)
        parts.orders = [list(range(parts.sizes.experts))] * 2

    return change


def retyped(key: str, value: object, kind: ValueType | None = None) -> Change:
    def change(parts: ExpertParts) -> None:
        parts.without_keys.add(key)
        parts.extra_entries.append((key, value, kind))

    return change


def without(key: str) -> Change:
    return lambda parts: parts.without_keys.add(key)


def order(values: list[int]) -> Change:
    return lambda parts: parts.orders.__setitem__(1, values)


def tensor(name: str) -> Change:
    return lambda parts: parts.extra_tensors.append((name, TensorType.F32, (4,)))


def test_what_was_written_comes_back(tmp_path: Path) -> None:
    path = write_split_experts(tmp_path / "m.powerinfer.gguf")
    split = SplitFile.open(path)
    assert split.header == HEADER
    assert [found.order.tolist() for found in split.units] == [list(made) for made in ORDERS]
    assert [(found.hot, found.group, found.shared_hot) for found in split.units] == [
        (2, 1, True),
        (5, 1, False),
    ]
    assert split.layers == ()
    assert split.gguf.metadata[names.KEY_VERSION] == 2
    for name in (names.expert_order_name(0), names.experts_name(1, "down")):
        assert split.gguf.info(name).offset % 64 == 0
    split.close()


def test_a_model_without_a_shared_expert_says_nothing_of_it(tmp_path: Path) -> None:
    def change(parts: ExpertParts) -> None:
        parts.header = replace(parts.header, hot_shared=())
        parts.without_keys.add("qwen2moe.expert_shared_feed_forward_length")

    split = SplitFile.open(write_split_experts(tmp_path / "m.gguf", change))
    assert names.KEY_HOT_SHARED not in split.gguf.metadata
    assert not split.units[0].shared_hot


def test_a_file_that_says_nothing_of_devices_has_all_but_experts_on_the_cpu(tmp_path: Path) -> None:
    split = SplitFile.open(write_split_experts(tmp_path / "m.gguf", header(devices=None)))
    assert split_devices.KEY_ATTENTION not in split.gguf.metadata
    assert split.devices == split_devices.all_on_cpu(2)
    assert split.devices.all_cpu


def test_layers_whose_experts_leave_out_zeros_say_so(tmp_path: Path) -> None:
    split = SplitFile.open(write_split_experts(tmp_path / "m.gguf", header(modes=("gate-first", "dense"))))
    assert split.modes == ("gate-first", "dense")
    assert split.gguf.metadata[names.KEY_MODE]
    split.close()
    split = SplitFile.open(write_split_experts(tmp_path / "n.gguf"))
    assert names.KEY_MODE not in split.gguf.metadata
    assert split.modes == ("dense", "dense")
    split.close()


@pytest.mark.parametrize(
    ("modes", "words"),
    [
        (("predicted", "dense"), "has 'predicted' for layer 0, known are dense, gate-first"),
        (("gate-first", "thresholded"), "has 'thresholded' for layer 1, known are dense, gate-first"),
        (("gate-first", "dense", "dense"), "3 .*2"),
    ],
)
def test_modes_that_experts_do_not_have(modes: tuple[str, ...], words: str, tmp_path: Path) -> None:
    path = write_split_experts(tmp_path / "m.gguf", header(modes=modes))
    with pytest.raises(errors.FormatError, match=words):
        SplitFile.open(path)


#: SHA-256 of the small split file of each version, as the first programs that wrote it did.
WRITTEN = {
    1: "abe0ab465676f03137fcc21c359ef8952414eb680da567261c0fb4225c504b7e",
    2: "d52d31db07999cfe718533d9274da76f14dd9d4a83b6e5a3de9e38be8fa6b844",
    3: "43b2999d3ed4ce7099babe715026311e5a48ba845bc9cee16afffdd0f08db697",
}


def test_every_version_is_written_as_ever_and_opens(tmp_path: Path) -> None:
    paths = {
        1: write_split(tmp_path / "1.gguf"),
        2: write_split_experts(tmp_path / "2.gguf"),
        3: write_split(tmp_path / "3.gguf", with_header(columns=True)),
    }
    for version, path in paths.items():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == WRITTEN[version]
        split = SplitFile.open(path)
        assert split.header.version == split.gguf.metadata[names.KEY_VERSION] == version
        assert [len(units.order) for units in split.units] == ([5, 5] if version == 2 else [12, 12, 12])
        split.close()


KEY = "powerinfer."
FAULTS: list[tuple[Change, type[errors.FormatError], str]] = [
    (without(names.KEY_VERSION), errors.NotASplitFile, "is not a split file"),
    (
        retyped(names.KEY_VERSION, 1, ValueType.UINT32),
        errors.BadValue,
        "is 1, that of models without experts",
    ),
    (retyped(names.KEY_VERSION, 3, ValueType.UINT32), errors.UnsupportedVersion, "version 3, .* reads 2"),
    (retyped(names.KEY_VERSION, "2"), errors.WrongKeyType, "powerinfer.version"),
    (without(names.KEY_SOURCE), errors.MissingKey, "source_fingerprint"),
    (header(source_fingerprint="ab"), errors.BadValue, "expected 64 hexadecimal digits"),
    (without(names.KEY_HOT_EXPERTS), errors.MissingKey, "hot_experts"),
    (
        hot(2),
        errors.BadValue,
        "hot_experts' has 1 values, expected one for each of 2 layers",
    ),
    (
        hot(2, 6),
        errors.BadValue,
        "hot_experts' has 6 for layer 1, expected 0 to 5",
    ),
    (retyped(names.KEY_HOT_EXPERTS, [2.0, 3.0], ValueType.FLOAT32), errors.WrongKeyType, "expected UINT32"),
    (retyped(names.KEY_HOT_EXPERTS, 2, ValueType.UINT32), errors.WrongKeyType, "hot_experts"),
    (header(hot_shared=()), errors.MissingKey, "hot_shared_experts"),
    (header(hot_shared=(True,)), errors.BadValue, "hot_shared_experts' has 1 values"),
    (retyped(names.KEY_HOT_SHARED, [1, 2], ValueType.UINT32), errors.BadValue, "has 2 for layer 1"),
    (
        without("qwen2moe.expert_shared_feed_forward_length"),
        errors.BadValue,
        "hot_shared_experts' is there, but the model has no shared expert",
    ),
    (without(names.KEY_TOOL_VERSION), errors.MissingKey, "tool_version"),
    (header(corpus_hashes=("zz" * 32,)), errors.BadValue, "corpus_sha256' is 'zz"),
    (without(names.KEY_CORPUS_TOKENS), errors.MissingKey, "corpus_tokens"),
    (
        header(devices=SplitDevices(("gpu",), ("cpu", "cpu"), "cpu")),
        errors.BadValue,
        "attention_device.*each of 2 layers",
    ),
    (
        header(devices=SplitDevices(("cpu", "cpu"), ("gpu", "cpu"), "cpu")),
        errors.BadValue,
        "predictor_device' has a 'gpu', but models with experts have no predictors",
    ),
    (
        header(devices=SplitDevices(("cpu", "gpu"), ("cpu", "cpu"), "none")),
        errors.BadValue,
        "head_device' is 'none', expected cpu or gpu",
    ),
    (without(split_devices.KEY_HEAD), errors.MissingKey, "head_device"),
    (order([0, 1, 2, 3, 3]), errors.NotAPermutation, "blk.1.expert_order' is not .* of 5 experts: 4 is"),
    (order([0, 1, 2, 3, 5]), errors.NotAPermutation, "4 is missing"),
    (order([0, 1, 2, 3, -1]), errors.NotAPermutation, "4 is missing"),
    (tensor("blk.0.ffn_up_exps.weight"), errors.UnexpectedTensor, "experts are in the order of the plan"),
    (sizes(experts=4), errors.WrongShape, r"ffn_gate_experts.* has the shape 4 × 32 × 64"),
    (sizes(neurons=64), errors.WrongShape, r"expected 5 × 32 × 64"),
    (sizes(width=32), errors.WrongShape, r"expected 5 × 32 × 64"),
    (retyped("qwen2moe.block_count", 3, ValueType.UINT32), errors.BadValue, "for each of 3 layers"),
    (
        retyped("qwen2moe.expert_count", 1 << 31, ValueType.UINT32),
        errors.BadValue,
        "is 2147483648",
    ),
    (without("qwen2moe.expert_count"), errors.MissingKey, "expert_count"),
    (without("qwen2moe.expert_feed_forward_length"), errors.MissingKey, "feed_forward_length"),
]


@pytest.mark.parametrize(("change", "kind", "says"), FAULTS)
def test_faults_are_named(change: Change, kind: type[errors.FormatError], says: str, tmp_path: Path) -> None:
    path = write_split_experts(tmp_path / "m.gguf", change)
    with pytest.raises(errors.FormatError, match=says) as caught:
        SplitFile.open(path)
    assert type(caught.value) is kind
    assert str(path) in str(caught.value)


def test_tensors_that_are_missing_are_named(tmp_path: Path) -> None:
    """A file of three layers whose third has no tensors."""

    def change(parts: ExpertParts) -> None:
        hot(2, 5, 1)(parts)
        parts.header = replace(parts.header, hot_shared=(True, False, True), devices=None)
        retyped("qwen2moe.block_count", 3, ValueType.UINT32)(parts)

    with pytest.raises(errors.MissingTensor, match=r"blk\.2\.ffn_gate_experts"):
        SplitFile.open(write_split_experts(tmp_path / "m.gguf", change))


def test_each_kind_of_split_file_is_refused_where_the_other_is_needed(tmp_path: Path) -> None:
    with (
        GGUFFile.open(write_split_experts(tmp_path / "m.gguf")) as gguf,
        pytest.raises(errors.BadValue, match="is 2, that of models with experts, which this one has not"),
    ):
        SplitFile.read(gguf, SplitSizes(layers=2, neurons=32, width=64))
    with (
        GGUFFile.open(write_split(tmp_path / "n.gguf")) as gguf,
        pytest.raises(errors.BadValue, match="is 1, that of models without experts"),
    ):
        SplitFile.read(gguf, SIZES)


@settings(
    derandomize=True,
    deadline=None,
    max_examples=250,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.lists(st.tuples(st.floats(0, 0.2), st.integers(0, 255)), min_size=1, max_size=4))
def test_damaged_files_are_consistent_or_refused(tmp_path: Path, changes: list[tuple[float, int]]) -> None:
    source = tmp_path / "whole.gguf"
    if not source.exists():
        write_split_experts(source)
    changed = bytearray(source.read_bytes())
    for share, value in changes:
        changed[int(share * len(changed))] = value
    (tmp_path / "m.gguf").write_bytes(changed)
    try:
        split = SplitFile.open(tmp_path / "m.gguf")
    except errors.FormatError:
        return
    for found in split.orders:
        assert sorted(found.tolist()) == list(range(split.header.experts))
    assert all(0 <= units.hot <= split.header.experts for units in split.units)
    split.close()
