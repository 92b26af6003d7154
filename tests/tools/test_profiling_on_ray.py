"""profile --ray: the same bytes as one run, also where workers are killed.

Ray is optional; without it these tests are skipped, and say so.
"""

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from powerinfer_tools.errors import CorpusError, ProfileError
from powerinfer_tools.stages.profile import ProfileOptions, run_profile
from powerinfer_tools.stages.profile.on_ray import profile_shard, run_profile_on_ray
from tiny_models import TinySpec, make_tiny_model

pytest.importorskip("ray", reason="profile --ray needs Ray (pip install '.[ray]')")
FILES = 5


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> ProfileOptions:
    folder = tmp_path_factory.mktemp("ray")
    corpus = folder / "corpus"
    corpus.mkdir()
    for number in range(FILES):
        (corpus / f"{number}.txt").write_text(f"the old road number {number} to the harbour\n" * (5 + number))
    model = make_tiny_model(folder, TinySpec(context=64)).path
    return ProfileOptions(model=model, corpus=(corpus,), output=folder / "x.profile.safetensors", threads=1)


@pytest.fixture(scope="module")
def expected(asked: ProfileOptions) -> bytes:
    """What one run writes."""
    run_profile(asked)
    return asked.output.read_bytes()


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if "ray" in path.name]


def killed_once(folder: Path) -> Callable[[ProfileOptions], bytes]:
    """The work of a shard, whose worker is killed in the middle the first time."""

    def work(options: ProfileOptions) -> bytes:
        assert options.shard is not None
        mark = folder / f"begun-{options.shard[0]}"
        if options.shard[0] in (1, 3) and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return profile_shard(options)

    return work


def test_lost_workers_are_replaced(asked: ProfileOptions, expected: bytes, tmp_path: Path) -> None:
    output = tmp_path / "y.profile.safetensors"
    run_profile_on_ray(replace(asked, output=output), "local", work=killed_once(tmp_path))
    assert {path.name for path in tmp_path.glob("begun-*")} == {"begun-1", "begun-3"}
    assert output.read_bytes() == expected
    assert leftovers(tmp_path) == []


def test_shards_that_are_done_are_not_done_again(
    asked: ProfileOptions, expected: bytes, tmp_path: Path
) -> None:
    output = tmp_path / "y.profile.safetensors"

    def fails(options: ProfileOptions) -> bytes:
        assert options.shard is not None
        if options.shard[0] == 2:
            raise CorpusError("made to fail")
        return profile_shard(options)

    def only_second(options: ProfileOptions) -> bytes:
        if options.shard != (2, FILES):
            raise CorpusError(f"shard {options.shard} is done again")
        return profile_shard(options)

    one_by_one = replace(asked, output=output, threads=os.cpu_count())
    with pytest.raises(CorpusError, match="made to fail"):
        run_profile_on_ray(one_by_one, "local", work=fails)
    done = leftovers(tmp_path)
    assert "y.ray-1-of-5.profile.safetensors" in done
    assert not output.exists()
    for number in (3, 4, 5):  # these may or may not have been done when the second failed
        part = tmp_path / f"y.ray-{number}-of-{FILES}.profile.safetensors"
        run_profile(replace(asked, output=part, shard=(number, FILES)))
    run_profile_on_ray(one_by_one, "local", work=only_second)
    assert output.read_bytes() == expected
    assert leftovers(tmp_path) == []


def test_a_machine_with_other_files_is_refused(asked: ProfileOptions, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for path in asked.corpus[0].iterdir():
        (other / path.name).write_text(path.read_text() + "more\n")

    def work(options: ProfileOptions) -> bytes:
        return profile_shard(replace(options, corpus=(other,)))

    with pytest.raises(CorpusError, match=r"another \d\.txt in its corpus"):
        run_profile_on_ray(replace(asked, output=tmp_path / "y.safetensors"), "local", work=work)


def test_a_cluster_that_is_not_there(asked: ProfileOptions, tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="cannot be reached"):
        run_profile_on_ray(replace(asked, output=tmp_path / "y.safetensors"), "not-an-address")
