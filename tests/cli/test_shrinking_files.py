"""A mapped file that another program shortens while it is read: one line that names it, and exit code 1."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from processes import command_line, environment

READ = """
import sys
from pathlib import Path
from powerinfer_formats.gguf_reader import GGUFFile
from powerinfer_kernels import Matrix, Pool, guard_mapped_files
guard_mapped_files(1)
path = Path(sys.argv[1])
with path.open("wb") as stream:
    stream.truncate(1 << 20)
import mmap
with path.open("rb") as stream:
    mapping = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
with path.open("r+b") as stream:
    stream.truncate(4096)
if sys.argv[2] == "python":
    mapping[1 << 19]
else:
    with Pool(3) as pool:
        Matrix.pack(pool, mapping, 0, 512, 512)
print("went on")
"""


@pytest.mark.parametrize("where", ["python", "threads of a pool"])
def test_a_read_behind_the_new_end(tmp_path: Path, where: str) -> None:
    path = tmp_path / "a model.gguf"
    ended = subprocess.run(
        [sys.executable, "-c", READ, str(path), where],
        capture_output=True,
        text=True,
        check=False,
        env=environment(),
    )
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith(f"powerinfer: {path}: became shorter")
    assert ended.stderr.count("\n") == 1


def test_a_source_that_is_cut_off_while_it_is_profiled(smollm2: Path, tmp_path: Path) -> None:
    """Wherever profile is by then, it says which file that was, and writes nothing under the final name."""
    source, text = tmp_path / "model.gguf", tmp_path / "text.txt"
    source.write_bytes(smollm2.read_bytes())
    text.write_text("The river was wide and slow, and the boats went down it. " * 2000)
    process = subprocess.Popen(
        command_line("profile", "-m", source, "--corpus", text, "--tokens", "2048", "-t", "1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    maps = Path(f"/proc/{process.pid}/maps")
    while process.poll() is None and str(source) not in maps.read_text():
        time.sleep(0.005)
    with source.open("r+b") as stream:
        stream.truncate(1 << 16)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1, err
    assert out == ""
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith(f"powerinfer: {source}: ") or "was changed" in err
    assert not list(tmp_path.glob("*.safetensors"))
