"""Models in shards: any file opens the set, and a set that is not whole or not one is refused by name."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter

from gguf_bytes import text, u32
from powerinfer_formats import errors
from powerinfer_formats.fingerprint import model_fingerprint
from powerinfer_formats.gguf_reader import GGUFFile
from powerinfer_formats.gguf_shards import ShardedGGUF, open_gguf
from powerinfer_formats.shard_names import model_name, shard_files
from shards import write_shards

TENSORS = {f"t{number}": np.arange(32 * (number + 1), dtype=np.float32) + number for number in range(5)}


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return write_with_gguf(tmp_path / "m.gguf")


def write_with_gguf(path: Path, **options: Any) -> Path:
    writer = GGUFWriter(path, "llama", **options)
    writer.add_uint32("llama.block_count", 2)
    writer.add_array("words", ["a", "b"])
    for name, values in TENSORS.items():
        writer.add_tensor(name, values)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()
    return path


@pytest.mark.parametrize("counts", [[2, 2, 1], [0, 5], [1, 1, 1, 1, 1]])
def test_any_shard_opens_all(whole: Path, tmp_path: Path, counts: list[int]) -> None:
    paths = write_shards(whole, tmp_path, counts)
    with GGUFFile.open(whole) as one:
        for path in paths:
            with open_gguf(path) as source:
                assert isinstance(source, ShardedGGUF)
                assert source.path == paths[0]
                assert source.container == f"GGUF version 3, {len(counts)} shards"
                assert source.nbytes == sum(file.stat().st_size for file in paths)
                assert list(source.tensors) == list(TENSORS)
                assert {**source.metadata, "words": 0} == {**one.metadata, "words": 0}
                assert list(source.metadata_bytes()) == [
                    (source.entries[entry.key], data) for entry, data in one.metadata_bytes()
                ]
                for name, values in TENSORS.items():
                    assert source.tensor(name).tobytes() == values.tobytes()


def test_shards_of_the_gguf_package(tmp_path: Path) -> None:
    write_with_gguf(tmp_path / "m.gguf", split_max_tensors=2)
    with open_gguf(tmp_path / "m-00002-of-00003.gguf") as source:
        assert source.get("llama.block_count", int) == 2
        assert {name: source.tensor(name).tobytes() for name in source.tensors} == {
            name: values.tobytes() for name, values in TENSORS.items()
        }


def test_the_fingerprint_is_over_all_shards(whole: Path, tmp_path: Path) -> None:
    paths = write_shards(whole, tmp_path, [2, 2, 1])
    fingerprints = set()
    for path in paths:
        with open_gguf(path) as source:
            fingerprints.add(model_fingerprint(source))
    assert len(fingerprints) == 1
    data = bytearray(paths[2].read_bytes())
    data[-64] ^= 1
    paths[2].write_bytes(data)
    with open_gguf(paths[0]) as source:
        assert model_fingerprint(source) not in fingerprints


def test_a_shard_that_is_changed_while_it_is_read(whole: Path, tmp_path: Path) -> None:
    paths = write_shards(whole, tmp_path, [2, 3])
    with open_gguf(paths[0]) as source:
        source.require_unchanged()
        with paths[1].open("r+b") as file:
            file.write(b"GGUF")
            file.truncate(paths[1].stat().st_size - 1)
        with pytest.raises(errors.FileChanged, match="00002-of-00002"):
            source.require_unchanged()


@pytest.mark.parametrize("missing", [[0], [1], [0, 2]])
def test_missing_shards_are_named(whole: Path, tmp_path: Path, missing: list[int]) -> None:
    paths = write_shards(whole, tmp_path, [2, 1, 1, 1])
    for number in missing:
        paths[number].unlink()
    with pytest.raises(errors.MissingShard) as caught:
        open_gguf(paths[3])
    for number, path in enumerate(paths[:3]):
        assert (path.name in str(caught.value)) == (number in missing)


def test_many_missing_shards_are_counted(whole: Path, tmp_path: Path) -> None:
    path = write_shards(whole, tmp_path, [5], {0: {"split.count": 900}})[0]
    with pytest.raises(errors.MissingShard, match=r"-00005-of-00900\.gguf and 895 more are missing"):
        open_gguf(path.rename(tmp_path / "m-00001-of-00900.gguf"))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({0: {"split.no": 1}}, errors.BadShard, r"shard 2 of 2, so its name has to end in -00002-of-00002"),
        ({0: {"split.count": 3}}, errors.BadShard, r"shard 1 of 3, .* -00001-of-00003"),
        ({0: {"split.count": 1}}, errors.BadShard, r"5 tensors, its 1 shards have 2"),
        ({0: {"split.count": 2000}}, errors.BadShard, "at most 1024"),
        ({0: {"split.no": None}, 1: {"split.no": None}}, errors.MissingKey, "split.no"),
        ({0: {"split.tensors.count": None}}, errors.MissingKey, "split.tensors.count"),
        ({0: {"split.tensors.count": -1}}, errors.BadShard, "split.tensors.count is -1"),
        ({0: {"split.tensors.count": 6}, 1: {"split.tensors.count": 6}}, errors.BadShard, "6 .* have 5"),
        ({1: {"split.tensors.count": 4}}, errors.BadShard, "is 4, the other shards say 5"),
        ({1: {"split.count": 3}}, errors.BadShard, "split.count is 3, the other shards say 2"),
        ({1: {"split.no": 0}}, errors.BadShard, "split.no is 0, the other shards say 1"),
        ({1: {"split.no": None}}, errors.MissingKey, "split.no"),
        ({1: {"split.count": None}}, errors.MissingKey, "split.count"),
        ({1: {"extra": text(b"words") + u32(4) + u32(3)}}, errors.BadShard, "metadata 'words'"),
        ({1: {"extra": text(b"llama.rope.base") + u32(6) + u32(0)}}, errors.BadShard, "'llama.rope.base'"),
    ],
)  # fmt: skip
def test_sets_that_contradict_themselves(
    whole: Path, tmp_path: Path, changes: dict[int, dict[str, Any]], error: type[Exception], message: str
) -> None:
    paths = write_shards(whole, tmp_path, [2, 3], changes)
    with pytest.raises(error, match=message):
        open_gguf(paths[0])


def test_a_later_shard_may_repeat_the_first(whole: Path, tmp_path: Path) -> None:
    repeated = {"extra": text(b"llama.block_count") + u32(4) + u32(2)}
    with open_gguf(write_shards(whole, tmp_path, [2, 3], {1: repeated})[1]) as source:
        assert list(source.tensors) == list(TENSORS)


def test_a_tensor_in_two_shards(whole: Path, tmp_path: Path) -> None:
    paths = write_shards(whole, tmp_path, [2, 3])
    again = write_shards(whole, tmp_path, [2, 3], {0: {"split.no": 1}})[0].read_bytes()
    write_shards(whole, tmp_path, [2, 3])
    paths[1].write_bytes(again)
    with pytest.raises(
        errors.DuplicateTensor, match=r"'t0' is in another shard, too \(m-00001-of-00002.gguf\)"
    ):
        open_gguf(paths[0])


def test_a_damaged_shard_is_named(whole: Path, tmp_path: Path) -> None:
    paths = write_shards(whole, tmp_path, [2, 3])
    paths[1].write_bytes(paths[1].read_bytes()[:-40])
    with pytest.raises(errors.TensorPastEnd, match=r"m-00002-of-00002\.gguf"):
        open_gguf(paths[0])


@pytest.mark.parametrize("count", [0, 1])
def test_a_merged_file_is_whole(whole: Path, tmp_path: Path, count: int) -> None:
    path = write_shards(whole, tmp_path, [5], {0: {"split.count": count}})[0].rename(tmp_path / "merged.gguf")
    with open_gguf(path) as source:
        assert list(source.tensors) == list(TENSORS)
        assert not [key for key in source.metadata if key.startswith("split.")]


def test_a_renamed_shard_says_what_its_name_has_to_be(whole: Path, tmp_path: Path) -> None:
    path = write_shards(whole, tmp_path, [2, 3])[1].rename(tmp_path / "other.gguf")
    with pytest.raises(
        errors.BadShard, match=r"shard 2 of 2, so its name has to end in -00002-of-00002\.gguf"
    ):
        open_gguf(path)


def test_names() -> None:
    assert model_name("a-b-00002-of-00003.gguf") == "a-b.gguf"
    assert model_name("a-00002-of-3.gguf") == "a-00002-of-3.gguf"
    assert shard_files(Path("x/a.gguf")) == [Path("x/a.gguf")]
    assert [file.name for file in shard_files(Path("a-00002-of-00002.gguf"))] == [
        "a-00001-of-00002.gguf",
        "a-00002-of-00002.gguf",
    ]
