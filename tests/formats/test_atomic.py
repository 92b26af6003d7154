# ruff: noqa: PT012 - an error has to come out of the whole with block: that is what is tested

import os
import subprocess
import sys
from pathlib import Path

import pytest

from powerinfer_formats import errors
from powerinfer_formats.atomic import partial_path, require_space, require_writable, write_atomic


def test_a_complete_file_appears_under_its_name(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    with write_atomic(path) as stream:
        stream.write(b"content")
        assert not path.exists()
    assert path.read_bytes() == b"content"
    assert [p.name for p in tmp_path.iterdir()] == ["file.bin"]


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    previous = os.umask(0o027)
    try:
        with write_atomic(path) as stream:
            stream.write(b"content")
    finally:
        os.umask(previous)
    assert path.stat().st_mode & 0o777 == 0o640


def test_what_can_be_written_is_found_out_without_writing(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    require_writable(path)
    assert not list(tmp_path.iterdir())
    path.write_bytes(b"old")
    require_writable(path)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.bin"]
    with pytest.raises(errors.NotARegularFile, match="it is a directory"):
        require_writable(tmp_path)
    with pytest.raises(errors.CannotWrite, match="No such file or directory"):
        require_writable(tmp_path / "gone" / "file.bin")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError])
def test_nothing_is_left_behind_an_error(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file.bin"
    with pytest.raises(error), write_atomic(path) as stream:
        stream.write(b"half")
        stream.flush()
        raise error
    assert not list(tmp_path.iterdir())


def test_the_old_file_survives_an_error(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), write_atomic(path) as stream:
        stream.write(b"new")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.bin"]


def test_an_error_of_the_block_that_is_not_about_the_file_passes(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), write_atomic(tmp_path / "file.bin"):
        (tmp_path / "other").open()
    assert not list(tmp_path.iterdir())


FULL_DISK = """
import resource, signal, sys
from powerinfer_formats.gguf_writer import GGUFWriter
from powerinfer_formats.errors import CannotWrite

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))
try:
    with GGUFWriter(sys.argv[1]) as writer:
        writer.declare("w", 0, (1_000_000,))
        for _ in range(4):
            writer.write("w", bytes(1_000_000))
except CannotWrite as error:
    print(error)
    sys.exit(7)
"""


def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path) -> None:
    """The kernel refuses to let the file grow, as on a full disk, in the middle of the weights."""
    path = tmp_path / "model.gguf"
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert (done.returncode, done.stderr) == (7, "")
    assert done.stdout.startswith(f"{path}: cannot be written: File too large")
    assert not list(tmp_path.iterdir())


def test_no_space_when_the_last_bytes_are_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with (
        pytest.raises(errors.CannotWrite, match="No space left"),
        write_atomic(tmp_path / "file.bin") as stream,
    ):
        stream.write(b"content")
    assert not list(tmp_path.iterdir())


def test_space_is_asked_for_in_advance(tmp_path: Path) -> None:
    require_space(tmp_path / "file.bin", 1)
    with pytest.raises(errors.CannotWrite, match=r"needs 1,152,921,504,606,846,976 bytes"):
        require_space(tmp_path / "file.bin", 2**60)


KILLED = """
import os, signal, sys
from powerinfer_formats.atomic import write_atomic

with write_atomic(sys.argv[1]) as stream:
    stream.write(b"x" * 3_000_000)
    stream.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_writer_leaves_is_not_the_file_and_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False, env=environment)
        assert done.returncode == -9
        assert [p.name for p in tmp_path.iterdir()] == [".file.bin.partial"]
    with write_atomic(path) as stream:
        stream.write(b"short")
    assert path.read_bytes() == b"short"
    assert [p.name for p in tmp_path.iterdir()] == ["file.bin"]


def test_two_writers_at_once_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    with write_atomic(path) as stream:
        stream.write(b"first")
        with pytest.raises(errors.BeingWritten, match="another process"), write_atomic(path):
            pass
        assert partial_path(path).exists()
    assert path.read_bytes() == b"first"


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with (
        pytest.raises(errors.CannotWrite, match="No such file or directory"),
        write_atomic(tmp_path / "no" / "file"),
    ):
        pass


def test_a_directory_is_not_overwritten(tmp_path: Path) -> None:
    with pytest.raises(errors.NotARegularFile), write_atomic(tmp_path):
        pass


def test_a_link_planted_under_the_temporary_name_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    partial_path(tmp_path / "file.bin").symlink_to(victim)
    with pytest.raises(errors.CannotWrite), write_atomic(tmp_path / "file.bin"):
        pass
    assert victim.read_bytes() == b"precious"
