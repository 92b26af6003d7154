"""Counts of neurons inside experts in a profile: files, faults, merging."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from powerinfer_formats import errors
from powerinfer_formats.checkpoint import CorpusPosition, ProfileCheckpoint
from powerinfer_formats.profile import ExpertSums, LayerSums, Profile
from profiles import EXPERTS, INSIDE, make_expert_profile, make_profile

Tensors = dict[str, np.ndarray]
Edit = Callable[[dict[str, Any], Tensors], object]


def without(profile: Profile) -> Profile:
    """The same, of which only experts were counted."""
    return replace(profile, sums=tuple(replace(layer, inside=None) for layer in profile.sums))


def insides(profile: Profile) -> list[list[Any] | None]:
    return [
        None if one is None else [one.tokens.tolist(), one.active.tolist()]
        for one in (layer.inside for layer in profile.sums)
    ]


def test_what_was_counted_comes_back(tmp_path: Path) -> None:
    profile = make_expert_profile(3)
    profile.save(tmp_path / "p")
    loaded = Profile.load(tmp_path / "p")
    assert insides(loaded) == insides(profile)
    assert insides(Profile.load(tmp_path / "p", counts_alone=True)) == insides(profile)
    loaded.save(tmp_path / "again")
    assert (tmp_path / "p").read_bytes() == (tmp_path / "again").read_bytes()
    assert [loaded.expert_neurons(layer) for layer in range(3)] == [0, INSIDE, INSIDE]
    checkpoint = ProfileCheckpoint(profile, CorpusPosition("ef" * 32, 5))
    checkpoint.save(tmp_path / "c")
    assert insides(ProfileCheckpoint.load(tmp_path / "c").profile) == insides(profile)


def test_a_file_without_it_is_as_it_was(tmp_path: Path) -> None:
    """Byte for byte: no field says so, and it opens."""
    profile = without(make_expert_profile(3))
    profile.save(tmp_path / "p")
    assert b"expert_neurons" not in (tmp_path / "p").read_bytes()
    loaded = Profile.load(tmp_path / "p")
    assert insides(loaded) == [None] * 3
    assert (loaded.density_inside(1), loaded.expert_density(1), loaded.order_inside(1)) == (None,) * 3


def test_a_tiny_section_byte_for_byte(tmp_path: Path) -> None:
    inside = ExpertSums(np.array([2, 1], np.uint64), np.array([[2, 0, 1], [1, 0, 0]], np.uint32))
    sums = LayerSums(np.array([2, 1], np.uint64), None, np.array([1.0, 0.5]), np.array([2.0, 1.0]), inside)
    base = make_profile(exact_zeros=True)
    corpus = (replace(base.corpus[0], tokens=3),)
    replace(base, tokens=3, corpus=corpus, activation="routing", sums=(sums,)).save(tmp_path / "p")
    data = (tmp_path / "p").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    document = header.pop("__metadata__")["powerinfer"]
    assert document.endswith('"neurons": [2], "checkpoint": null, "expert_neurons": [3]}')
    assert [(name, info["dtype"], info["shape"], info["data_offsets"]) for name, info in header.items()] == [
        ("blk.0.counts", "U64", [2], [0, 16]),
        ("blk.0.gate_squares", "F64", [2], [16, 32]),
        ("blk.0.up_squares", "F64", [2], [32, 48]),
        ("blk.0.expert_tokens", "U64", [2], [48, 64]),
        ("blk.0.expert_active", "U32", [2, 3], [64, 88]),
        ("thresholds", "F32", [1], [88, 92]),
    ]
    assert data[8 + size + 48 : 8 + size + 88] == (
        b"\x02\x00\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00"
        b"\x02\x00\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00"
        b"\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
    )


def test_densities_and_orders() -> None:
    tokens, active = (
        np.array([4, 0, 2], np.uint64),
        np.array([[4, 0, 2, 2], [0] * 4, [1, 2, 2, 0]], np.uint32),
    )
    zeros = np.zeros(3)
    layer = LayerSums(np.array([4, 0, 5], np.uint64), None, zeros, zeros, ExpertSums(tokens, active))
    profile = make_profile(exact_zeros=True, activation="routing", sums=(layer,))
    assert profile.density_inside(0) == 13 / 24
    shares = profile.expert_density(0)
    assert shares is not None
    assert shares.tolist() == [0.5, 13 / 24, 0.625]  # that of all, where no token took it
    order = profile.order_inside(0)
    assert order is not None
    assert order.tolist() == [[0, 2, 3, 1], [0, 1, 2, 3], [1, 2, 0, 3]]


def test_merging_adds_up_in_every_grouping(tmp_path: Path) -> None:
    """Those that counted experts alone add nothing to the neurons."""
    a, b, c, d = (make_expert_profile(seed, 20 + seed) for seed in range(4))
    c = without(c)
    files = []
    for index, merged in enumerate(
        (
            Profile.merge([a, b, c, d]),
            Profile.merge([Profile.merge([c, a]), Profile.merge([d, b])]),
            Profile.merge([Profile.merge([d, Profile.merge([c, b])]), a]),
        )
    ):
        merged.save(tmp_path / str(index))
        files.append((tmp_path / str(index)).read_bytes())
    assert files[0] == files[1] == files[2]
    merged = Profile.load(tmp_path / "0")
    for layer in (1, 2):
        parts = [part.sums[layer].inside for part in (a, b, d)]
        whole = merged.sums[layer].inside
        assert whole is not None
        assert whole.active.tolist() == sum(one.active for one in parts if one).tolist()
        assert whole.tokens.tolist() == sum(one.tokens for one in parts if one).tolist()
        assert (whole.tokens < merged.counts(layer)).all()


def test_experts_of_other_sizes_do_not_merge() -> None:
    def cut(profile: Profile) -> Profile:
        return replace(
            profile,
            sums=tuple(
                layer
                if layer.inside is None
                else replace(layer, inside=replace(layer.inside, active=layer.inside.active[:, 1:]))
                for layer in profile.sums
            ),
        )

    profiles = [without(make_expert_profile(0)), make_expert_profile(1), cut(make_expert_profile(2))]
    with pytest.raises(errors.CannotMerge, match=r"neurons of the experts of layer 1: \[6, 7\]"):
        Profile.merge(profiles)


def field(name: str, value: Any) -> Edit:
    return lambda document, tensors: document.__setitem__(name, value)


def tensor(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Edit:
    return lambda document, tensors: tensors.__setitem__(name, change(tensors[name]))


def raised(array: np.ndarray) -> np.ndarray:
    return array + array.dtype.type(1)


def largest(array: np.ndarray) -> np.ndarray:
    return np.full_like(array, np.iinfo(array.dtype).max)


FAULTS: list[tuple[Edit, type[errors.FormatError], str]] = [
    (field("expert_neurons", [0, 0, 0]), errors.BadField, "expert_neurons has nothing but zeros"),
    (field("expert_neurons", [0, 7]), errors.BadField, "expert_neurons has 2 layers, expected 3"),
    (field("expert_neurons", [0, 7, 7, 7]), errors.BadField, "expert_neurons has 4 layers"),
    (field("expert_neurons", [0, -7, 7]), errors.BadField, r"expert_neurons\[1\] is -7"),
    (field("expert_neurons", [0, 2**25, 7]), errors.BadField, r"expert_neurons\[1\] is 33554432"),
    (field("expert_neurons", [0, True, 7]), errors.BadField, r"expert_neurons\[1\] is True"),
    (field("expert_neurons", None), errors.BadField, "expert_neurons is null, expected a list"),
    (field("expert_neurons", []), errors.UnexpectedTensor, "expert_"),
    (field("expert_neurons", [7, 7, 7]), errors.MissingTensor, r"blk\.0\.expert_tokens"),
    (field("expert_neurons", [0, 7, 0]), errors.UnexpectedTensor, r"blk\.2\.expert_"),
    (field("expert_neurons", [0, 1 << 24, 7]), errors.WrongShape, r"blk\.1\.expert_active"),
    (field("activation", "relu"), errors.BadField, "expert_neurons is of a profile that does not count"),
    (lambda d, t: d.pop("expert_neurons"), errors.UnexpectedTensor, "expert_"),
    (lambda d, t: t.pop("blk.2.expert_active"), errors.MissingTensor, r"blk\.2\.expert_active"),
    (lambda d, t: t.pop("blk.1.expert_tokens"), errors.MissingTensor, r"blk\.1\.expert_tokens"),
    (tensor("blk.1.expert_active", lambda a: a[:, :3]), errors.WrongShape, r"blk\.1\.expert_active"),
    (tensor("blk.1.expert_active", lambda a: a.astype(np.int32)), errors.WrongType, "I32, expected U32"),
    (tensor("blk.1.expert_tokens", lambda a: a.astype(np.int64)), errors.WrongType, "I64, expected U64"),
    (tensor("blk.1.expert_tokens", raised), errors.BadValue, "more tokens of an expert than took it"),
    (tensor("blk.1.expert_tokens", largest), errors.BadValue, "more tokens of an expert than took it"),
    (tensor("blk.2.expert_active", largest), errors.BadValue, "active for more tokens than were counted"),
    (
        lambda d, t: t.__setitem__("blk.1.expert_active", np.full((EXPERTS, INSIDE), 60, np.uint32)),
        errors.BadValue,
        "active for more tokens than were counted",
    ),
]


@pytest.mark.parametrize(("edit", "error", "words"), FAULTS, ids=range(len(FAULTS)))
def test_each_fault_has_its_error(
    tmp_path: Path, edit: Edit, error: type[errors.FormatError], words: str
) -> None:
    path = tmp_path / "p"
    make_expert_profile().save(path)
    tensors = load_file(path)
    with path.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    document = json.loads(header["__metadata__"]["powerinfer"])
    edit(document, tensors)
    save_file(
        {k: np.ascontiguousarray(v) for k, v in tensors.items()}, path, {"powerinfer": json.dumps(document)}
    )
    with pytest.raises(errors.FormatError, match=words) as caught:
        Profile.load(path)
    assert type(caught.value) is error
    assert str(caught.value).startswith(str(path))


def test_what_would_not_open_is_not_written(tmp_path: Path) -> None:
    profile = make_expert_profile()
    inside = profile.sums[1].inside
    assert inside is not None
    bad = replace(profile.sums[1], inside=replace(inside, active=inside.active + np.uint32(64)))
    with pytest.raises(errors.BadValue, match="active for more tokens"):
        replace(profile, sums=(profile.sums[0], bad, profile.sums[2])).save(tmp_path / "p")
    assert not list(tmp_path.iterdir())
