"""Folders for what is needed meanwhile."""

import os
import signal
import tempfile
from pathlib import Path

import pytest

from powerinfer_formats.scratch import scratch_folder


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def killed(name: str) -> Path:
    """What a process leaves that is killed with such a folder open."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with scratch_folder(name) as folder:
            (folder / "large").write_bytes(b"x" * 1000)
            os.write(writing, str(folder).encode())
            signal.pause()
    path = Path(os.read(reading, 4096).decode())
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reading)
    os.close(writing)
    return path


def test_it_is_empty_and_gone_at_the_end(place: Path) -> None:
    with scratch_folder("verify") as folder:
        assert list(folder.iterdir()) == []
        assert folder.parent == place
        assert folder.stat().st_mode & 0o077 == 0
    assert list(place.iterdir()) == []
    with pytest.raises(FileNotFoundError), scratch_folder("verify") as folder:
        (folder / "sub" / "sub").mkdir()
    assert list(place.iterdir()) == []


def test_the_next_run_removes_what_a_killed_one_left(place: Path) -> None:
    left, other = killed("verify"), killed("else")
    assert (left / "large").exists()
    with scratch_folder("verify") as folder:
        assert not left.exists()
        assert sorted(place.iterdir()) == sorted([folder, other])


def test_folders_in_use_and_what_is_no_folder_stay(place: Path) -> None:
    (place / "powerinfer-verify-file").touch()
    (place / "elsewhere").mkdir()
    (place / "powerinfer-verify-link").symlink_to(place / "elsewhere")
    with scratch_folder("verify") as first, scratch_folder("verify") as second:
        assert first != second
        assert first.is_dir()
    assert {path.name for path in place.iterdir()} == {
        "elsewhere", "powerinfer-verify-file", "powerinfer-verify-link",
    }  # fmt: skip
