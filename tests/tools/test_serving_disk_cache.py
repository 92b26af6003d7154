"""--cache-dir: what a server computed is there for the next one, exact; what is damaged or foreign is not."""

import hashlib
import os
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hybrid_families import FAMILIES, write_random_family
from powerinfer_tools.engine import Engine
from powerinfer_tools.generate.generation import logits_hash
from powerinfer_tools.model.loading import load_model
from powerinfer_tools.serving.disk_cache import _of_state
from powerinfer_tools.serving.prefix_store import BLOCK, PrefixStore, PrefixStoreError, keys
from predicted_models import predicted_split
from served_models import Served
from split_models import Prepared
from tiny_models import CASES, TinyModel, TinySpec, make_tiny_model

PROMPT = [3 + number * 7 % 40 for number in range(2 * BLOCK + 90)]
ASKED: dict[str, Any] = {"max_tokens": 6, "temperature": 0, "ignore_eos": True, "logits_hash": True}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"), TinySpec(context=1024))


def ask(path: Path, folder: Path, prompt: list[int] = PROMPT, **more: Any) -> tuple[int, str, str]:
    """Tokens from the cache, text and hash of a server that is started for this, and ended."""
    with Served(path, cache_dir=folder, **more) as served:
        answer = served.ready().complete(prompt, **ASKED)
    cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    return cached, answer["choices"][0]["text"], answer["logits_hash"][0]


@pytest.fixture
def filled(tiny: TinyModel, tmp_path: Path) -> tuple[Path, tuple[int, str, str]]:
    """A folder with the blocks of the prompt, and the answer."""
    folder = tmp_path / "cache"
    first = ask(tiny.path, folder)
    assert first[0] == 0
    return folder, first


def test_the_next_server_has_what_this_one_computed(
    tiny: TinyModel, filled: tuple[Path, tuple[int, str, str]]
) -> None:
    folder, first = filled
    assert len(list(folder.iterdir())) == 2
    assert ask(tiny.path, folder) == (2 * BLOCK, *first[1:])
    shorter = ask(tiny.path, folder, PROMPT[: BLOCK + 1])
    assert shorter[0] == BLOCK
    other = [*PROMPT[:BLOCK], 5, *PROMPT[BLOCK:]]
    assert ask(tiny.path, folder, other)[0] == BLOCK
    assert ask(tiny.path, folder, [9, *PROMPT])[0] == 0


@pytest.mark.parametrize("name", ["q8_0", "predicted"])
def test_other_caches_and_modes(tmp_path: Path, name: str) -> None:
    if name == "predicted":
        _, path, _ = predicted_split(tmp_path, context=1024)
        more: dict[str, Any] = {"mode": "predicted"}
    else:
        path = make_tiny_model(tmp_path, TinySpec(context=1024, head_dim=32)).path
        more = {"kv_type": "q8_0"}
    first = ask(path, tmp_path / "cache", **more)
    assert ask(path, tmp_path / "cache", **more) == (2 * BLOCK, *first[1:])
    assert ask(path, tmp_path / "cache", **(more | {"kv_type": "f16"}))[0] == (2 * BLOCK) * (name != "q8_0")


def test_company_and_places_that_are_needed_change_nothing(tiny: TinyModel, tmp_path: Path) -> None:
    """Long prompts with common starts, fewer places than requests: blocks are saved and restored while others
    are computed; then a second server on the same folder."""
    chooser = random.Random(4)
    prompts = []
    for _ in range(10):
        cut = chooser.choice((200, BLOCK, BLOCK + 40, 2 * BLOCK))
        prompts.append(PROMPT[:cut] + [chooser.randrange(3, 40) for _ in range(chooser.randrange(5, 300))])
    with Served(tiny.path) as served:
        served.ready()
        alone = [served.complete(prompt, **ASKED, cache_prompt=False) for prompt in prompts]
    expected = [(answer["choices"][0]["text"], answer["logits_hash"]) for answer in alone]
    for turn in range(2):
        with Served(tiny.path, cache_dir=tmp_path / "cache", parallel=2) as served:
            served.ready()
            order = chooser.sample(range(len(prompts)), len(prompts)) * 2
            with ThreadPoolExecutor(6) as pool:
                answers = list(pool.map(lambda number: served.complete(prompts[number], **ASKED), order))
            for number, answer in zip(order, answers, strict=True):
                assert (answer["choices"][0]["text"], answer["logits_hash"]) == expected[number]
            batcher = served.service.batcher
            assert batcher is not None
            assert turn == 0 or batcher.figures.restored_tokens > 0
            assert served.said == []


def damage(path: Path, folder: Path, kind: str) -> None:
    data = bytearray(path.read_bytes())
    match kind:
        case "shorter":
            path.write_bytes(data[:-1])
        case "longer":
            path.write_bytes(data + b"x")
        case "flipped":
            data[-1] ^= 1
            path.write_bytes(data)
        case "head":
            data[20] ^= 1
            path.write_bytes(data)
        case "tokens":  # with a hash that fits: not the text of its key
            ids = bytes(data[88 : 88 + 4 * BLOCK][::-1])
            block = data[88 + 4 * BLOCK :]
            path.write_bytes(bytes(data[:56]) + hashlib.sha256(ids + block).digest() + ids + bytes(block))
        case "renamed":
            (other,) = [each for each in folder.iterdir() if each != path]
            path.write_bytes(other.read_bytes())
        case "link":
            path.rename(folder.parent / "elsewhere")
            path.symlink_to(folder.parent / "elsewhere")
        case "pipe":
            path.unlink()
            os.mkfifo(path)
        case "folder":
            path.unlink()
            path.mkdir()


@pytest.mark.parametrize(
    "kind", ["shorter", "longer", "flipped", "head", "tokens", "renamed", "link", "pipe", "folder"]
)
def test_what_is_damaged_is_not_used(
    tiny: TinyModel, filled: tuple[Path, tuple[int, str, str]], kind: str
) -> None:
    folder, first = filled
    identity_free = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    damage(identity_free[0], folder, kind)
    cached, *answer = ask(tiny.path, folder)
    assert (cached, tuple(answer)) == (0, first[1:])


def test_another_model_or_context_has_blocks_of_its_own(
    tiny: TinyModel, filled: tuple[Path, tuple[int, str, str]], tmp_path: Path
) -> None:
    folder, _ = filled
    (tmp_path / "other").mkdir()
    other = make_tiny_model(tmp_path / "other", TinySpec(context=1024, seed=5)).path
    assert ask(other, folder)[0] == 0
    assert ask(tiny.path, folder, context=900)[0] == 0


def test_the_folder_has_a_size(tmp_path: Path) -> None:
    store = PrefixStore(tmp_path / "cache", 3 * 2000)
    tokens = list(range(BLOCK))
    made = [next(keys(bytes([number]), tokens)) for number in range(4)]
    for key in made[:3]:
        store.put(key, tokens, b"x" * 800)
    assert store.get(made[0], tokens, 800) == b"x" * 800
    store.put(made[3], tokens, b"x" * 800)
    assert [key in store for key in made] == [True, False, True, True]
    assert store.nbytes == sum(path.stat().st_size for path in (tmp_path / "cache").iterdir()) <= 6000
    assert [key in PrefixStore(tmp_path / "cache", 2 * 2000) for key in made] == [True, False, False, True]
    store.put(made[1], tokens, b"x" * 10_000)
    assert made[1] not in store


def test_folders_that_cannot_be_used(tiny: TinyModel, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PrefixStoreError, match="file"):
        PrefixStore(tmp_path / "file", 1 << 20)
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(PrefixStoreError, match="others may write there"):
        PrefixStore(tmp_path / "open", 1 << 20)
    (tmp_path / "left").mkdir()
    (tmp_path / "left/.x.prefix.partial").touch()
    PrefixStore(tmp_path / "left", 1 << 20)
    assert list((tmp_path / "left").iterdir()) == []


def test_a_full_disk_is_said_once_and_the_server_goes_on(
    tiny: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PrefixStore, "put", refuse)
    with Served(tiny.path, cache_dir=tmp_path / "cache") as served:
        served.ready()
        for first in (5, 6):
            assert served.complete([first, *PROMPT], **ASKED)["usage"]["completion_tokens"] == 6
    (said,) = served.said
    assert "takes no more blocks: [Errno 28] No space left" in said


def bodies(served: Served, prompts: list[list[int]], **more: Any) -> list[tuple[str, list[str]]]:
    """Text and hash of each prompt's answer."""
    answers = [served.complete(prompt, **(ASKED | more)) for prompt in prompts]
    return [(answer["choices"][0]["text"], answer["logits_hash"]) for answer in answers]


@pytest.fixture(scope="module", params=["falcon-h1", "mamba2", "lfm2", "qwen3next"])
def recurrent(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recurrent") / "model.gguf"
    return write_random_family(path, FAMILIES[request.param], context=1024, text=True)


def test_recurrent_families_begin_where_their_state_was_kept(recurrent: Path, tmp_path: Path) -> None:
    """Beside each block is the state at its end; a text that leaves the first one within the second block
    begins after the first block."""
    folder = tmp_path / "cache"
    first = ask(recurrent, folder)
    assert (first[0], len(list(folder.iterdir()))) == (0, 4)
    assert ask(recurrent, folder) == (2 * BLOCK, *first[1:])
    other = [*PROMPT[: BLOCK + 90], 5, *PROMPT[BLOCK:]]
    with Served(recurrent) as served:
        expected = bodies(served.ready(), [other, PROMPT])
    cached, *answer = ask(recurrent, folder, other)
    assert (cached, answer) == (BLOCK, [expected[0][0], *expected[0][1]])
    assert first[1:] == (expected[1][0], *expected[1][1])


def test_recurrent_families_in_company(recurrent: Path, tmp_path: Path) -> None:
    """Turns of conversations whose places are needed by others go on from the disk, or from the place."""
    chooser = random.Random(7)
    starts = [[3 + (number * step) % 40 for number in range(2 * BLOCK)] for step in (7, 9, 11)]
    prompts = [
        start[: chooser.choice((BLOCK + 3, 2 * BLOCK))]
        + [chooser.randrange(3, 40) for _ in range(chooser.randrange(5, 200))]
        for start in starts * 3
    ]
    with Served(recurrent) as served:
        expected = bodies(served.ready(), prompts, cache_prompt=False)
    with Served(recurrent, cache_dir=tmp_path / "cache", parallel=2) as served:
        served.ready()
        order = chooser.sample(range(len(prompts)), len(prompts)) * 2
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda number: bodies(served, [prompts[number]])[0], order))
        assert answers == [expected[number] for number in order]
        assert served.service.batcher is not None
        assert served.service.batcher.figures.restored_tokens > 0
        assert served.said == []


def test_a_state_that_is_not_there_costs_its_block_alone(recurrent: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    first = ask(recurrent, folder)
    with Served(recurrent, cache_dir=folder) as served:
        cache = served.ready().service.batcher._disk  # type: ignore[union-attr]
        assert cache is not None
        ends = cache._ends(PROMPT)
    (folder / f"{_of_state(ends[1][1]).hex()}.prefix").unlink()
    assert ask(recurrent, folder) == (BLOCK, *first[1:])
    damage(folder / f"{_of_state(ends[0][1]).hex()}.prefix", folder, "flipped")
    (folder / f"{_of_state(ends[1][1]).hex()}.prefix").unlink()
    assert ask(recurrent, folder) == (0, *first[1:])


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    pytest.importorskip("torch", reason="the hot side runs through torch")
    spec = replace(CASES["llama-relu"], context=1024, neurons=96, head_dim=32)
    return Prepared(tmp_path_factory.mktemp("hot"), spec)


@pytest.mark.parametrize("attention", [(), (0, 2), (0, 1, 2)], ids=["neurons", "some", "all"])
@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_with_a_hot_device_whole_slices_are_used_again(
    prepared: Prepared, tmp_path: Path, attention: tuple[int, ...], kind: str
) -> None:
    """Prompts are cut as ``run`` cuts them, every 192 tokens here: 384 of 512 saved tokens are of use."""
    path = prepared.split([16] * prepared.layers, attention=attention, head=len(attention) == 3)
    more: dict[str, Any] = {"device": "cpu", "batch": 192, "kv_type": kind}
    first = ask(path, tmp_path / "cache", **more)
    assert (first[0], len(list((tmp_path / "cache").iterdir()))) == (0, 2)
    assert ask(path, tmp_path / "cache", **more) == (384, *first[1:])
    other = [*PROMPT[:400], *PROMPT[:150]]
    with Served(path, cache_dir=tmp_path / "cache", **more) as served:
        served.ready()
        expected = bodies(served, [PROMPT, other], cache_prompt=False)
        assert bodies(served, [other, PROMPT, PROMPT, other]) == [expected[i] for i in (1, 0, 0, 1)]
        answer = served.complete(PROMPT, **ASKED)
        # Two places hold both texts, in three pieces of their prompts; one holds the other text.
        cached = 384 if attention else 576
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == cached
    assert ask(path, tmp_path / "cache", **(more | {"batch": 128}))[0] == 0
    with Engine(load_model(path), threads=1, **more) as engine:
        logits = engine.prefill(PROMPT)
        for _ in range(ASKED["max_tokens"] - 1):
            logits = engine.decode(int(logits.argmax()))
        assert logits_hash(logits) == first[2]
