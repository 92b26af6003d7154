import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from powerinfer_formats import errors
from powerinfer_formats.checkpoint import CorpusPosition, ProfileCheckpoint
from powerinfer_formats.histogram import BINS, active_counts, contribution_bins, lower_edge, threshold_bin
from powerinfer_formats.profile import Corpus, LayerSums, Profile, round_squares
from powerinfer_formats.profile_sums import SQUARE_LIMIT
from powerinfer_formats.safetensors_file import write_safetensors
from profiles import LAYERS, NEURONS, WINDOW, activity, make_profile, sums_of

# --- histograms --------------------------------------------------------------------------------------


def test_bins_are_four_an_octave() -> None:
    values = [
        0.0,
        2.0**-17,
        2.0**-16,
        1.25 * 2.0**-16,
        1.0,
        1.2499,
        1.25,
        1.5,
        1.75,
        1.9999,
        2.0,
        1.75 * 2.0**15,
    ]
    expected = [0, 0, 0, 1, 64, 64, 65, 66, 67, 67, 68, 127]
    assert contribution_bins(np.array(values, np.float32)).tolist() == expected
    assert contribution_bins(-np.array(values, np.float32)).tolist() == expected


@pytest.mark.parametrize("value", [2.0**16, 3e38, np.inf, -np.inf, np.nan])
def test_what_is_beyond_is_in_the_last_bin(value: float) -> None:
    assert contribution_bins(np.array([value], np.float32)).tolist() == [127]


def test_edges_and_bins_agree() -> None:
    for index in range(1, BINS):
        edge = np.float32(lower_edge(index))
        assert float(edge) == lower_edge(index)
        assert contribution_bins(np.array([edge])).tolist() == [index]
        assert contribution_bins(np.nextafter(edge, np.float32(0))[None]).tolist() == [index - 1]
    for index in (-1, BINS):
        with pytest.raises(ValueError, match="of 128"):
            lower_edge(index)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.lists(st.integers(0, 50), min_size=BINS, max_size=BINS), st.floats(0.01, 1.0))
def test_the_threshold_is_the_nearest_edge(per_bin: list[int], target: float) -> None:
    histogram = np.array([per_bin, per_bin[::-1]], np.uint32)
    total = int(histogram.sum())
    shares = [int(histogram[:, b:].sum()) for b in range(BINS)]
    distances = [abs(share - target * total) for share in shares]
    nearest = max(b for b in range(BINS) if distances[b] == min(distances))
    assert threshold_bin(histogram, target) == nearest
    assert active_counts(histogram, nearest).sum() == shares[nearest]


# --- what a profile says -----------------------------------------------------------------------------


def test_counts_of_exact_zeros_are_those_of_the_tokens() -> None:
    profile = make_profile(3, 64, exact_zeros=True)
    gate, up = activity(3, 64)
    for layer in range(LAYERS):
        expected = ((gate[layer] * up[layer]) != 0).sum(axis=0)
        assert profile.counts(layer).tolist() == expected.tolist()
        assert profile.frequency(layer).tolist() == (expected / 64).tolist()
    assert profile.thresholds.tolist() == [0.0, 0.0]


def test_counts_of_smooth_activations_are_those_at_or_above_the_threshold() -> None:
    profile = make_profile(3, 64)
    gate, up = activity(3, 64)
    for layer in range(LAYERS):
        contribution = np.abs(gate[layer] * up[layer])
        expected = (contribution >= profile.thresholds[layer]).sum(axis=0)
        assert profile.counts(layer).tolist() == expected.tolist()
        # The target can be missed by half a bin; a bin here holds a tenth of the contributions at most.
        assert abs(profile.density(layer) - 0.25) < 0.05


def test_order_is_by_count_then_index() -> None:
    counts = np.array([5, 9, 0, 9, 5, 64] + [1] * (NEURONS - 6), np.uint64)
    zeros = np.zeros(NEURONS)
    profile = make_profile(exact_zeros=True, sums=(LayerSums(counts, None, zeros, zeros),) * LAYERS)
    assert profile.order(0).tolist() == [5, 1, 3, 0, 4, *range(6, NEURONS), 2]
    assert profile.order(0).dtype == np.int32


def test_rms_is_of_the_tokens() -> None:
    profile = make_profile(1, 64)
    gate, up = activity(1, 64)
    # Each of the four windows is rounded by half a grid step at most.
    for layer in range(LAYERS):
        for found, exact in ((profile.gate_rms(layer), gate[layer]), (profile.up_rms(layer), up[layer])):
            squares = (exact.astype(np.float64) ** 2).sum(axis=0)
            assert np.all(np.abs(found**2 * 64 - squares) <= 4 * 2.0**-17 + 1e-9 * squares)


def test_another_target_needs_no_other_run() -> None:
    profile = make_profile(2, 64)
    denser = profile.with_target(0.5)
    assert denser.density(0) > profile.density(0)
    assert abs(denser.density(0) - 0.5) < 0.05


# --- merging -----------------------------------------------------------------------------------------


def assert_equal(a: Profile, b: Profile) -> None:
    for name in ("fingerprint", "tokens", "corpus", "window", "target_density", "tool_version", "model_name"):
        assert getattr(a, name) == getattr(b, name)
    assert a.thresholds.tolist() == b.thresholds.tolist()
    for left, right, layer in zip(a.sums, b.sums, range(LAYERS), strict=True):
        assert np.array_equal(left.gate_squares, right.gate_squares)
        assert np.array_equal(left.up_squares, right.up_squares)
        assert np.array_equal(a.counts(layer), b.counts(layer))
        for x, y in ((left.counts, right.counts), (left.histogram, right.histogram)):
            assert (x is None) == (y is None)
            assert x is None or np.array_equal(x, y)


@pytest.mark.parametrize("exact_zeros", [False, True])
def test_merging_is_exact_in_every_order_and_grouping(tmp_path: Path, exact_zeros: bool) -> None:
    parts = [make_profile(seed, 16 * (seed + 1), exact_zeros=exact_zeros) for seed in range(4)]
    whole = Profile.merge(parts)
    for order in itertools.permutations(parts):
        a, b, c, d = order
        assert_equal(whole, Profile.merge(order))
        assert_equal(whole, Profile.merge([Profile.merge([a, b]), Profile.merge([c, d])]))
        assert_equal(whole, Profile.merge([a, Profile.merge([b, Profile.merge([c, d])])]))
    whole.save(tmp_path / "a")
    Profile.merge(parts[::-1]).save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("exact_zeros", [False, True])
def test_shards_of_a_corpus_merge_into_the_profile_of_the_whole(exact_zeros: bool) -> None:
    gate, up = activity(7, 80)

    def part(first: int, last: int, corpus: tuple[Corpus, ...]) -> Profile:
        window = slice(first, last)
        sums = tuple(sums_of(gate[i, window], up[i, window], exact_zeros=exact_zeros) for i in range(LAYERS))
        return make_profile(tokens=last - first, exact_zeros=exact_zeros, sums=sums, corpus=corpus)

    a, b = Corpus("a", "00" * 32, 32, 1), Corpus("b", "00" * 32, 48, 1)
    assert 32 % WINDOW == 0
    assert_equal(Profile.merge([part(32, 80, (b,)), part(0, 32, (a,))]), part(0, 80, (a, b)))


def test_a_threshold_comes_from_the_merged_histograms() -> None:
    parts = [make_profile(seed, 64) for seed in range(3)]
    merged = Profile.merge(parts)
    for layer in range(LAYERS):
        histogram = sum(p.sums[layer].histogram for p in parts)  # type: ignore[misc]
        assert merged.thresholds[layer] == lower_edge(threshold_bin(histogram, 0.25))  # type: ignore[arg-type]


def test_tool_versions_and_names_do_not_depend_on_the_order() -> None:
    a, b = (
        make_profile(0, tool_version="2", model_name="x"),
        make_profile(1, tool_version="1", model_name="y"),
    )
    for merged in (Profile.merge([a, b]), Profile.merge([b, a])):
        assert (merged.tool_version, merged.model_name) == ("1, 2", "x")


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.lists(st.floats(0, 2.0**36), min_size=2, max_size=30), st.randoms(use_true_random=False))
def test_rounded_squares_add_up_alike_in_every_order(values: list[float], random: Any) -> None:
    rounded = round_squares(np.array(values)).tolist()
    assert all(abs(r - v) <= 2.0**-17 for r, v in zip(rounded, values, strict=True))
    shuffled = list(rounded)
    random.shuffle(shuffled)
    scaled = [v / 64 for v in rounded]  # stay below the limit: 30 · 2^36 / 64 < 2^37
    grid = round_squares(np.array(scaled)).tolist()
    again = list(grid)
    random.shuffle(again)
    assert sum(grid) == sum(again)


def test_squares_are_cut_at_the_limit_and_never_nan() -> None:
    top = SQUARE_LIMIT - 2.0**-16
    assert round_squares(np.array([np.inf, np.nan, 1e300, SQUARE_LIMIT])).tolist() == [top] * 4
    full = make_profile(
        0, 16, sums=(replace(make_profile(0, 16).sums[0], gate_squares=np.full(NEURONS, top)),) * 2
    )
    merged = Profile.merge([full, make_profile(1, 16)])
    assert merged.sums[0].gate_squares.tolist() == [top] * NEURONS


CANNOT_MERGE: list[tuple[dict[str, Any], str]] = [
    ({"fingerprint": "cd" * 32}, "differ in fingerprint"),
    ({"architecture": "qwen2"}, "differ in architecture"),
    ({"activation": "gelu_tanh"}, "differ in activation"),
    ({"window": 32}, "differ in window: 16 and 32"),
    ({"target_density": 0.5}, r"differ in target_density: 0\.25 and 0\.5"),
    ({"sums": make_profile().sums[:1]}, "differ in their neurons"),
    ({"corpus": make_profile(0).corpus}, r"corpus-0\.txt.*would count twice"),
    ({"tokens": 2**32 - 10}, "more than a profile can count"),
]


@pytest.mark.parametrize(("fields", "words"), CANNOT_MERGE, ids=[words for _, words in CANNOT_MERGE])
def test_profiles_that_do_not_belong_together(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(errors.CannotMerge, match=words):
        Profile.merge([make_profile(0), replace(make_profile(1), **fields)])


def test_nothing_to_merge() -> None:
    with pytest.raises(errors.CannotMerge, match="nothing"):
        Profile.merge([])


def test_the_same_text_under_two_names_is_two_corpora() -> None:
    other = make_profile(1, corpus=(Corpus("copy.txt", f"{0:064x}", 64, 320),))
    assert len(Profile.merge([make_profile(0), other]).corpus) == 2


# --- files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exact_zeros", [False, True])
def test_a_profile_comes_back(tmp_path: Path, exact_zeros: bool) -> None:
    profile = make_profile(5, 48, exact_zeros=exact_zeros)
    path = tmp_path / "m.profile.safetensors"
    profile.save(path)
    loaded = Profile.load(path)
    assert_equal(profile, loaded)
    loaded.save(tmp_path / "again")
    assert path.read_bytes() == (tmp_path / "again").read_bytes()


def test_a_tiny_profile_byte_for_byte(tmp_path: Path) -> None:
    sums = LayerSums(np.array([2, 1], np.uint64), None, np.array([1.0, 0.5]), np.array([0.0, 4.0]))
    corpus = (Corpus("c", "00" * 32, 3, 9),)
    profile = make_profile(exact_zeros=True, tokens=3, sums=(sums,), corpus=corpus, model_name="m")
    profile.save(tmp_path / "p")
    zero, ab = "00" * 32, "ab" * 32
    document = (
        f'{{"format": "powerinfer-profile", "version": 1, "fingerprint": "{ab}", "model_name": "m", '
        '"architecture": "llama", "activation": "relu", "exact_zeros": true, "tokens": 3, "window": 16, '
        f'"target_density": 0.25, "corpus": [{{"name": "c", "sha256": "{zero}", "tokens": 3, "bytes": 9}}], '
        '"tool_version": "0.1.0", "neurons": [2], "checkpoint": null}'
    )
    header = (
        '{"__metadata__":{"powerinfer":' + json.dumps(document) + "},"
        '"blk.0.counts":{"dtype":"U64","shape":[2],"data_offsets":[0,16]},'
        '"blk.0.gate_squares":{"dtype":"F64","shape":[2],"data_offsets":[16,32]},'
        '"blk.0.up_squares":{"dtype":"F64","shape":[2],"data_offsets":[32,48]},'
        '"thresholds":{"dtype":"F32","shape":[1],"data_offsets":[48,52]}}'
    ).encode()
    header += b" " * (-len(header) % 8)
    data = (
        b"\x02\x00\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00"
        b"\x00\x00\x00\x00\x00\x00\xf0\x3f\x00\x00\x00\x00\x00\x00\xe0\x3f"
        b"\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x10\x40"
        b"\x00\x00\x00\x00"
    )
    assert (tmp_path / "p").read_bytes() == len(header).to_bytes(8, "little") + header + data


def test_the_safetensors_package_reads_it(tmp_path: Path) -> None:
    profile = make_profile()
    profile.save(tmp_path / "p")
    tensors = load_file(tmp_path / "p")
    assert np.array_equal(tensors["blk.1.histogram"], profile.sums[1].histogram)  # type: ignore[arg-type]
    assert np.array_equal(tensors["blk.0.counts"], profile.counts(0))
    assert np.array_equal(tensors["thresholds"], profile.thresholds)


def test_a_checkpoint_is_not_a_profile_and_comes_back(tmp_path: Path) -> None:
    empty = make_profile(tokens=16, corpus=(Corpus("c", "00" * 32, 16, 9),))
    checkpoint = ProfileCheckpoint(empty, CorpusPosition("ef" * 32, 5))
    path = tmp_path / "m.profile.partial"
    checkpoint.save(path)
    loaded = ProfileCheckpoint.load(path)
    assert loaded.position == checkpoint.position
    assert_equal(loaded.profile, empty)
    with pytest.raises(errors.UnfinishedProfile, match=r"5 windows.*run powerinfer profile again"):
        Profile.load(path)
    empty.save(path)
    with pytest.raises(errors.UnfinishedProfile, match="not a checkpoint"):
        ProfileCheckpoint.load(path)


def test_a_checkpoint_before_the_first_window(tmp_path: Path) -> None:
    zeros = np.zeros(NEURONS)
    sums = (LayerSums(None, np.zeros((NEURONS, BINS), np.uint32), zeros, zeros),) * LAYERS
    nothing = make_profile(tokens=0, corpus=(), sums=sums)
    ProfileCheckpoint(nothing, CorpusPosition("ef" * 32, 0)).save(tmp_path / "c")
    assert ProfileCheckpoint.load(tmp_path / "c").profile.tokens == 0
    with pytest.raises(errors.BadField, match="tokens is 0"):
        nothing.save(tmp_path / "p")


# --- faults ------------------------------------------------------------------------------------------

Tensors = dict[str, np.ndarray]
Edit = Callable[[dict[str, Any], Tensors], None]


def field(name: str, value: Any) -> Edit:
    return lambda document, tensors: document.__setitem__(name, value)


def corpus_field(name: str, value: Any) -> Edit:
    return lambda document, tensors: document["corpus"][0].__setitem__(name, value)


def drop_field(name: str) -> Edit:
    return lambda document, tensors: document.pop(name)


def tensor(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Edit:
    return lambda document, tensors: tensors.__setitem__(name, change(tensors[name]))


def drop_tensor(name: str) -> Edit:
    return lambda document, tensors: tensors.pop(name)  # type: ignore[return-value]


def extra_tensor(document: dict[str, Any], tensors: Tensors) -> None:
    tensors["extra"] = np.zeros(1, np.float32)


def set_at(index: Any, value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        changed = array.copy()
        changed[index] = value
        return changed

    return change


FAULTS: list[tuple[Edit, type[errors.FormatError], str]] = [
    (field("format", "powerinfer-plan"), errors.BadDocument, "not a profile"),
    (field("version", 2), errors.UnsupportedVersion, "version 2.*profile again"),
    (field("fingerprint", "xyz"), errors.BadField, "fingerprint is not 64"),
    (field("tokens", 0), errors.BadField, "tokens is 0"),
    (field("tokens", 2**32), errors.BadField, "tokens is 4294967296"),
    (field("tokens", 65), errors.BadField, "corpus counts 64 tokens, the profile 65"),
    (field("tokens", "64"), errors.BadField, "expected a whole number"),
    (field("window", 0), errors.BadField, "window is 0"),
    (field("target_density", 0), errors.BadField, r"target_density is 0\.0"),
    (field("target_density", 1.01), errors.BadField, r"target_density is 1\.01"),
    (field("exact_zeros", 0), errors.BadField, "exact_zeros is 0, expected true or false"),
    (field("exact_zeros", True), errors.UnexpectedTensor, "histogram"),
    (field("neurons", []), errors.BadField, "neurons has 0 layers"),
    (field("neurons", [24] * 5000), errors.BadField, "neurons has 5000 layers"),
    (field("neurons", [24, 0]), errors.BadField, r"neurons\[1\] is 0"),
    (field("neurons", [24, 2**40]), errors.BadField, r"neurons\[1\] is 1099511627776"),
    (field("neurons", [24, 25]), errors.WrongShape, r"blk\.1\.counts"),
    (field("neurons", [24, 24, 24]), errors.MissingTensor, r"blk\.2\.counts"),
    (field("neurons", [24]), errors.WrongShape, "thresholds"),
    (field("surprise", 1), errors.BadField, "surprise is not a known field"),
    (drop_field("activation"), errors.BadField, "activation is missing"),
    (drop_field("checkpoint"), errors.BadField, "checkpoint is missing"),
    (field("checkpoint", {"work": "x", "windows": 1}), errors.BadField, r"checkpoint\.work"),
    (field("checkpoint", {"work": "ab" * 32, "windows": -1}), errors.BadField, r"checkpoint\.windows"),
    (corpus_field("sha256", "0"), errors.BadField, r"corpus\[0\]\.sha256"),
    (corpus_field("bytes", -1), errors.BadField, r"corpus\[0\] has a negative"),
    (corpus_field("tokens", 1.0), errors.BadField, r"corpus\[0\]\.tokens is 1\.0"),
    (lambda d, t: d["corpus"].append(d["corpus"][0]), errors.BadField, "names a file twice"),
    (drop_tensor("blk.1.histogram"), errors.MissingTensor, r"blk\.1\.histogram"),
    (drop_tensor("thresholds"), errors.MissingTensor, "thresholds"),
    (extra_tensor, errors.UnexpectedTensor, "'extra'"),
    (tensor("blk.0.counts", lambda a: a.astype(np.int64)), errors.WrongType, "I64, expected U64"),
    (tensor("blk.0.histogram", lambda a: a[:, :64]), errors.WrongShape, r"blk\.0\.histogram"),
    (tensor("blk.0.histogram", set_at((0, 0), 1000)), errors.BadValue, "bins do not sum to 64"),
    (tensor("blk.1.counts", lambda a: a + np.uint64(1)), errors.BadValue, r"blk\.1\.counts' is not what"),
    (tensor("thresholds", set_at(1, 123.0)), errors.BadValue, r"thresholds\[1\] is 123\.0"),
    (tensor("thresholds", set_at(0, np.nan)), errors.BadValue, r"thresholds\[0\] is nan"),
    (tensor("blk.0.gate_squares", set_at(3, np.nan)), errors.BadValue, "gate_squares.*not finite"),
    (tensor("blk.0.gate_squares", set_at(3, -1.0)), errors.BadValue, "negative"),
    (tensor("blk.0.up_squares", set_at(3, 2.0**37)), errors.BadValue, "up_squares.*above"),
    (tensor("blk.0.up_squares", set_at(3, 0.1)), errors.BadValue, "multiple of 2"),
]


@pytest.mark.parametrize(("edit", "error", "words"), FAULTS, ids=range(len(FAULTS)))
def test_each_fault_has_its_error(
    tmp_path: Path, edit: Edit, error: type[errors.FormatError], words: str
) -> None:
    path = tmp_path / "p"
    make_profile().save(path)
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


def test_counts_above_the_tokens(tmp_path: Path) -> None:
    zeros = np.zeros(NEURONS)
    sums = (LayerSums(np.full(NEURONS, 65, np.uint64), None, zeros, zeros),) * LAYERS
    with pytest.raises(errors.BadValue, match="more than the 64 tokens"):
        make_profile(exact_zeros=True, sums=sums).save(tmp_path / "p")
    assert not list(tmp_path.iterdir())


def test_sums_that_were_not_rounded_are_not_written(tmp_path: Path) -> None:
    profile = make_profile()
    sums = (replace(profile.sums[0], up_squares=np.full(NEURONS, 0.1)), profile.sums[1])
    with pytest.raises(errors.BadValue, match="see round_squares"):
        replace(profile, sums=sums).save(tmp_path / "p")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "data", [b"", b"x", b"\xff" * 8, b"\x02" + b"\x00" * 7 + b"{}", b"GGUF" + b"\x00" * 60]
)
def test_what_is_no_safetensors_file(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "p"
    path.write_bytes(data)
    with pytest.raises(errors.BadSafetensors):
        Profile.load(path)


def test_safetensors_of_somebody_else(tmp_path: Path) -> None:
    save_file({"x": np.zeros(2, np.float32)}, tmp_path / "p", {"format": "pt"})
    with pytest.raises(errors.BadSafetensors, match="not a file of powerinfer"):
        Profile.load(tmp_path / "p")


def test_a_document_that_is_no_json(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "p", "{", {"x": np.zeros(2, np.float32)})
    with pytest.raises(errors.BadDocument, match="not valid JSON"):
        Profile.load(tmp_path / "p")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(errors.CannotRead):
        Profile.load(tmp_path / "none")
    with pytest.raises(errors.NotARegularFile):
        Profile.load(tmp_path)


def test_a_profile_cut_anywhere_is_refused(tmp_path: Path) -> None:
    sums = LayerSums(np.array([2, 1], np.uint64), None, np.zeros(2), np.zeros(2))
    make_profile(exact_zeros=True, tokens=3, sums=(sums,), corpus=(Corpus("c", "00" * 32, 3, 9),)).save(
        tmp_path / "p"
    )
    data = (tmp_path / "p").read_bytes()
    cut = tmp_path / "cut"
    for length in range(len(data)):
        cut.write_bytes(data[:length])
        with pytest.raises(errors.FormatError):
            Profile.load(cut)


def test_counts_alone_say_what_the_histograms_did(tmp_path: Path) -> None:
    path = tmp_path / "made.profile.safetensors"
    made = make_profile(exact_zeros=False)
    made.save(path)
    light = Profile.load(path, counts_alone=True)
    for layer in range(made.layers):
        assert light.sums[layer].histogram is None
        np.testing.assert_array_equal(light.counts(layer), made.counts(layer))
        np.testing.assert_array_equal(light.order(layer), made.order(layer))
    assert (light.counting, light.tokens, light.corpus) == (made.counting, made.tokens, made.corpus)
