"""Models of the hub, from one on the loopback: what is fetched, kept and found, and what is said."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections import namedtuple
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
from huggingface_hub import close_session, constants, file_download

from powerinfer_tools.errors import HubError
from powerinfer_tools.hub import blobs
from powerinfer_tools.hub.cached import find_cached, incomplete_bytes, list_models, remove
from powerinfer_tools.hub.offers import choose, offers
from powerinfer_tools.hub.pulling import Pulled, pull
from powerinfer_tools.hub.reference import Reference
from powerinfer_tools.progress import Silent
from small_hub import COMMIT, SmallHub

GGUF = {
    "README.md": b"# a model",
    "m-Q4_K_M.gguf": bytes(range(256)) * 20_000,
    "m-Q8_0.gguf": b"eight" * 999,
    "UD-Q2_K_XL/m-UD-Q2_K_XL-00001-of-00002.gguf": b"one" * 1000,
    "UD-Q2_K_XL/m-UD-Q2_K_XL-00002-of-00002.gguf": b"two" * 1000,
    "m-IQ4_XS-00001-of-00002.gguf": b"alone",
    "mmproj-m-F16.gguf": b"eyes",
}
INDEX = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
FOLDER = {
    "config.json": b"{}",
    "tokenizer.json": b'{"model": {}}',
    "pytorch_model.bin": b"never fetched",
    "model.safetensors.index.json": json.dumps(INDEX).encode(),
    "model-00001-of-00002.safetensors": b"first" * 100,
    "model-00002-of-00002.safetensors": b"second" * 100,
    "consolidated.safetensors": b"the same once more",
}


@pytest.fixture
def hub() -> Iterator[SmallHub]:
    """A hub with files and a directory."""
    with SmallHub({"o/gguf": dict(GGUF), "o/folder": dict(FOLDER)}).serving() as hub:
        yield hub


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def fetch(hub: SmallHub, cache: Path, name: str, progress: Silent | None = None) -> Pulled:
    return pull(Reference.parse(name), progress, endpoint=hub.endpoint, cache=cache)


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# --- what is fetched ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("o/gguf", ["m-Q4_K_M.gguf"]),
        ("o/gguf:q8_0", ["m-Q8_0.gguf"]),
        ("o/gguf:m-Q8_0.gguf", ["m-Q8_0.gguf"]),
        ("https://huggingface.co/o/gguf:Q8_0", ["m-Q8_0.gguf"]),
        ("o/gguf:UD-Q2_K_XL", [name for name in GGUF if "XL" in name]),
        ("o/folder", sorted(set(FOLDER) - {"pytorch_model.bin", "consolidated.safetensors"})),
    ],
)
def test_a_model_is_fetched_whole_and_found_again(
    hub: SmallHub, cache: Path, name: str, files: list[str]
) -> None:
    source = GGUF | FOLDER
    assert find_cached(Reference.parse(name), cache) is None
    pulled = fetch(hub, cache, name)
    snapshot = cache / Reference.parse(name).folder_name / "snapshots" / COMMIT
    assert names(snapshot) == set(files) == set(pulled.files)
    for file in files:
        assert (snapshot / file).read_bytes() == source[file]
    assert pulled.path == (snapshot if "folder" in name else snapshot / files[0])
    assert pulled.fetched_bytes == pulled.nbytes == sum(len(source[file]) for file in files)
    hub.failing = 500
    before = len(hub.requests)
    assert find_cached(Reference.parse(name), cache) == pulled.path
    assert len(hub.requests) == before


def test_nothing_is_fetched_twice(hub: SmallHub, cache: Path) -> None:
    fetch(hub, cache, "o/gguf")
    assert fetch(hub, cache, "o/gguf").fetched_bytes == 0
    assert len(hub.bodies("m-Q4_K_M.gguf")) == 1


def test_pull_brings_a_model_up_to_date(hub: SmallHub, cache: Path) -> None:
    old = fetch(hub, cache, "o/gguf:Q8_0")
    hub.commit, hub.files["o/gguf"]["m-Q8_0.gguf"] = "f" * 40, b"better"
    new = fetch(hub, cache, "o/gguf:Q8_0")
    assert (new.path.read_bytes(), old.path.read_bytes()) == (b"better", GGUF["m-Q8_0.gguf"])
    assert find_cached(Reference.parse("o/gguf:Q8_0"), cache) == new.path
    assert [(model.current, model.nbytes) for model in list_models(cache)] == [(True, 6), (False, 4995)]


def test_small_files_have_hashes_of_git(hub: SmallHub, cache: Path) -> None:
    hub.lfs = False
    assert fetch(hub, cache, "o/gguf:Q8_0").path.read_bytes() == GGUF["m-Q8_0.gguf"]
    hub.damaged.add("m-Q4_K_M.gguf")
    with pytest.raises(HubError, match="damaged during the download"):
        fetch(hub, cache, "o/gguf")


# --- what goes wrong ---------------------------------------------------------------------------------


class InterruptedAt(Silent):
    """Ctrl-C after so many megabytes."""

    def __init__(self, megabytes: int) -> None:
        self.left, self.notes = megabytes, list[str]()

    def advance(self, n: int) -> None:
        self.left -= n
        if self.left <= 0 and n:
            raise KeyboardInterrupt

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_an_interrupted_download_goes_on_where_it_was(
    hub: SmallHub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100_000)
    listener = InterruptedAt(2)
    with pytest.raises(KeyboardInterrupt):
        fetch(hub, cache, "o/gguf", listener)
    assert listener.notes == ["2.0 MB of 5.1 MB are kept; the same command continues from there"]
    assert not names(cache / "models--o--gguf/snapshots")
    assert [path.suffix for path in (cache / "models--o--gguf/blobs").iterdir()] == [".incomplete"]
    assert find_cached(Reference.parse("o/gguf"), cache) is None
    had = incomplete_bytes(cache)
    assert 2_000_000 <= had < 2_200_000
    pulled = fetch(hub, cache, "o/gguf")
    assert pulled.path.read_bytes() == GGUF["m-Q4_K_M.gguf"]
    assert pulled.fetched_bytes == pulled.nbytes - had
    assert hub.bodies("m-Q4_K_M.gguf") == ["", f"bytes={had}-"]
    assert incomplete_bytes(cache) == 0


def test_a_connection_that_is_cut_is_taken_up_again(
    hub: SmallHub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100_000)
    hub.cut_after, hub.cuts = 1_000_000, 2
    assert fetch(hub, cache, "o/gguf").path.read_bytes() == GGUF["m-Q4_K_M.gguf"]
    assert [bool(span) for span in hub.bodies("m-Q4_K_M.gguf")] == [False, True, True]


def test_a_file_that_is_damaged_on_the_way_is_not_kept(hub: SmallHub, cache: Path) -> None:
    hub.damaged.add("m-Q8_0.gguf")
    with pytest.raises(
        HubError, match=r"m-Q8_0\.gguf was damaged during the download: its hash is .* the hub says"
    ):
        fetch(hub, cache, "o/gguf:Q8_0")
    assert not names(cache / "models--o--gguf")


def test_a_damaged_beginning_is_fetched_again(hub: SmallHub, cache: Path) -> None:
    """What is kept of an interrupted download is judged with the whole."""
    data = GGUF["m-Q8_0.gguf"]
    folder = cache / "models--o--gguf/blobs"
    folder.mkdir(parents=True)
    partial = folder / f"{hashlib.sha256(data).hexdigest()}.incomplete"
    partial.write_bytes(b"X" * 100)
    with pytest.raises(HubError, match="damaged"):
        fetch(hub, cache, "o/gguf:Q8_0")
    assert fetch(hub, cache, "o/gguf:Q8_0").path.read_bytes() == data
    longer = folder / f"{hashlib.sha256(GGUF['m-Q4_K_M.gguf']).hexdigest()}.incomplete"
    longer.write_bytes(GGUF["m-Q4_K_M.gguf"] + b"more")
    assert fetch(hub, cache, "o/gguf").path.read_bytes() == GGUF["m-Q4_K_M.gguf"]


def test_two_processes_do_not_fetch_the_same_file(hub: SmallHub, cache: Path) -> None:
    blob = blobs.Blob("m-Q8_0.gguf", "", 10, "a" * 64)
    cache.mkdir()
    with (
        blobs._locked(cache / "x.incomplete", blob),
        pytest.raises(HubError, match=r"m-Q8_0\.gguf is being fetched by another process"),
        blobs._locked(cache / "x.incomplete", blob),
    ):
        raise AssertionError("locked twice")


def test_a_disk_without_room_is_said_before(
    hub: SmallHub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 1_000_000))
    with pytest.raises(HubError, match=r"needs 5\.1 MB more in .*blobs, where 1\.0 MB are free; make room"):
        fetch(hub, cache, "o/gguf")
    assert not hub.bodies("m-Q4_K_M.gguf")


def test_a_disk_that_fills_up(hub: SmallHub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: blobs._Counted, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(blobs._Counted, "write", full)
    with pytest.raises(HubError, match="the disk is full"):
        fetch(hub, cache, "o/gguf")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("o/gguf:Q3_K_S", r"o/gguf has no Q3_K_S; there are: .*UD-Q2_K_XL, .*Q4_K_M, Q8_0$"),
        ("o/gguf:safetensors", "has no safetensors"),
        ("o/gguf:IQ4_XS", r"has no m-IQ4_XS-00002-of-00002\.gguf, a part of IQ4_XS"),
        ("o/none", "has no model o/none, or it is private"),
        ("o/gated", r"o/gated is gated: accept its terms at http://127.*/o/gated, and set HF_TOKEN"),
        ("o/empty", "has neither GGUF files nor safetensors"),
        ("o/hostile", "has neither GGUF files nor safetensors"),
        ("o/index", "does not have gone.safetensors, which model.safetensors.index.json names"),
    ],
)
def test_what_cannot_be_had_is_named(hub: SmallHub, cache: Path, name: str, message: str) -> None:
    hub.gated.add("o/gated")
    hub.files |= {
        "o/empty": {"README.md": b"x"},
        "o/hostile": {"../../up-Q4_0.gguf": b"x", "/etc/q4_0.gguf": b"x", "a\x1b-Q4_0.gguf": b"x"},
        "o/index": FOLDER | {"model.safetensors.index.json": b'{"weight_map": {"a": "gone.safetensors"}}'},
    }
    with pytest.raises(HubError, match=message):
        fetch(hub, cache, name)
    assert not list(cache.parent.glob("up-*"))


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (500, "status 500"),
        (429, "too many requests"),
        (401, "the token is not valid"),
        (403, "no right to it"),
    ],
)
def test_answers_that_refuse(
    hub: SmallHub, cache: Path, status: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.failing = status
    with pytest.raises(HubError, match=message):
        fetch(hub, cache, "o/gguf")


def test_no_network(cache: Path) -> None:
    with SmallHub({}).serving() as hub:
        closed = hub.endpoint
    hub.endpoint = closed
    with pytest.raises(HubError, match=r"cannot be reached \(.*refused.*powerinfer list"):
        fetch(hub, cache, "o/gguf")


def test_offline(hub: SmallHub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    close_session()
    with pytest.raises(HubError, match="HF_HUB_OFFLINE forbids the network"):
        fetch(hub, cache, "o/gguf")
    assert not hub.requests
    monkeypatch.undo()
    close_session()


class Page(BaseHTTPRequestHandler):
    """Answers everything with a page, as the sign-in page of a hotel does."""

    def do_GET(self) -> None:
        body = b"<html>Welcome</html>"
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words: object) -> None:
        """Say nothing."""


def test_a_server_that_is_no_hub(cache: Path) -> None:
    server = HTTPServer(("127.0.0.1", 0), Page)
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        with pytest.raises(HubError, match=r"does not answer as a hub does .*HF_ENDPOINT"):
            pull(Reference.parse("o/n"), endpoint=f"http://127.0.0.1:{server.server_address[1]}", cache=cache)
    finally:
        server.shutdown()
        server.server_close()


# --- what is there ------------------------------------------------------------------------------------


def test_models_are_listed_and_removed_one_by_one(hub: SmallHub, cache: Path) -> None:
    assert list_models(cache) == []
    for name in ("o/gguf:Q8_0", "o/gguf:UD-Q2_K_XL", "o/folder"):
        fetch(hub, cache, name)
    assert [model.reference for model in list_models(cache)] == [
        "o/folder:safetensors",
        "o/gguf:Q8_0",
        "o/gguf:UD-Q2_K_XL",
    ]
    with pytest.raises(
        HubError, match=r"in the cache as Q8_0, UD-Q2_K_XL: name one of them, or remove all \(--all\)"
    ):
        remove(Reference.parse("o/gguf"), cache=cache)
    with pytest.raises(HubError, match=r"has no Q4_0 in the cache; there are: Q8_0, UD-Q2_K_XL"):
        remove(Reference.parse("o/gguf:Q4_0"), cache=cache)
    assert remove(Reference.parse("o/gguf:q8_0"), cache=cache) == len(GGUF["m-Q8_0.gguf"])
    assert [model.reference for model in list_models(cache)] == ["o/folder:safetensors", "o/gguf:UD-Q2_K_XL"]
    assert remove(Reference.parse("o/folder"), cache=cache) > 1000
    assert remove(Reference.parse("o/gguf:UD-Q2_K_XL"), cache=cache) == 6000
    assert list_models(cache) == []
    assert not [path for path in names(cache) if "blobs" in path or "snapshots" in path]
    with pytest.raises(HubError, match="is not in the cache"):
        remove(Reference.parse("o/gguf"), cache=cache)


def test_a_repository_with_the_same_commit_is_kept(hub: SmallHub, tmp_path: Path) -> None:
    for cache in (tmp_path / str(number) for number in range(8)):  # the order of repositories is by chance
        kept = fetch(hub, cache, "o/gguf:Q8_0")
        fetch(hub, cache, "o/folder")
        remove(Reference.parse("o/folder"), cache=cache)
        assert [model.reference for model in list_models(cache)] == ["o/gguf:Q8_0"]
        assert kept.path.read_bytes() == GGUF["m-Q8_0.gguf"]


def test_bytes_that_another_name_has_are_kept(hub: SmallHub, cache: Path) -> None:
    hub.files["o/gguf"]["n-Q8_1.gguf"] = GGUF["m-Q8_0.gguf"]
    kept = fetch(hub, cache, "o/gguf:Q8_1")
    fetch(hub, cache, "o/gguf:Q8_0")
    assert remove(Reference.parse("o/gguf:Q8_0"), cache=cache) == 0
    assert kept.path.read_bytes() == GGUF["m-Q8_0.gguf"]


def test_what_was_fetched_in_part_is_removed(hub: SmallHub, cache: Path) -> None:
    folder = cache / "models--o--gguf/blobs"
    folder.mkdir(parents=True)
    (folder / f"{'a' * 64}.incomplete").write_bytes(b"x" * 500)
    assert remove(Reference.parse("o/gguf"), cache=cache) == 500
    assert incomplete_bytes(cache) == 0


def test_of_several_in_the_cache_the_preferred_is_taken(hub: SmallHub, cache: Path) -> None:
    fetch(hub, cache, "o/gguf:UD-Q2_K_XL")
    assert find_cached(Reference.parse("o/gguf:Q8_0"), cache) is None
    only = find_cached(Reference.parse("o/gguf"), cache)
    assert only is not None
    assert only.name == "m-UD-Q2_K_XL-00001-of-00002.gguf"
    eight = fetch(hub, cache, "o/gguf:Q8_0").path
    assert find_cached(Reference.parse("o/gguf"), cache) == eight


def test_a_set_or_a_directory_with_a_file_missing_is_not_found(hub: SmallHub, cache: Path) -> None:
    fetch(hub, cache, "o/gguf:UD-Q2_K_XL").path.unlink()
    (fetch(hub, cache, "o/folder").path / "model-00002-of-00002.safetensors").unlink()
    assert find_cached(Reference.parse("o/gguf"), cache) is None
    assert find_cached(Reference.parse("o/folder"), cache) is None
    assert list_models(cache) == []


@pytest.mark.parametrize(
    ("file", "label"),
    [
        ("Llama-3.2-3B-Instruct-Q4_K_M.gguf", "Q4_K_M"),
        ("gemma-3-4b-it-q4_0.gguf", "Q4_0"),
        ("x.IQ2_XXS.gguf", "IQ2_XXS"),
        ("gpt-oss-20b-mxfp4.gguf", "MXFP4"),
        ("BF16/x-BF16-00001-of-00001.gguf", "BF16"),
        ("x-UD-Q4_K_XL.gguf", "UD-Q4_K_XL"),
        ("model.gguf", "model"),
        ("Q8_0.gguf", "Q8_0"),
        ("smollm2-135m-instruct-tq2_0.gguf", "TQ2_0"),
    ],
)
def test_labels(file: str, label: str) -> None:
    assert [offer.label for offer in offers([file])] == [label]


def test_two_files_of_one_label_are_named() -> None:
    offered = offers(["a-Q4_0.gguf", "b-Q4_0.gguf"])
    with pytest.raises(HubError, match=r"several files of Q4_0: name one of a-Q4_0\.gguf, b-Q4_0\.gguf"):
        choose(offered, Reference.parse("o/n:Q4_0"))
    assert choose(offered, Reference.parse("o/n:b-Q4_0.gguf")).files == ("b-Q4_0.gguf",)


@pytest.mark.parametrize(
    "text",
    ["", "name", "a/b/c", "../x", "a/..", "a/b--c", "a/b:", "a/b:../c", "a/b:\x1b", "-a/b", "a/b.", "a b/c"],
)
def test_names_that_are_none(text: str) -> None:
    with pytest.raises(HubError):
        Reference.parse(text)
