"""What a run from disk does when the disk fails, the file changes, or memory is short: it ends with one line
that names the file, and every logit that it gave until then is that of the model in memory."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from powerinfer_tools.measure.synthetic.models import write_synthetic
from powerinfer_tools.measure.synthetic.shapes import SHAPES, Shape
from powerinfer_tools.measure.synthetic.sparse import Sparsity, write_sparse
from powerinfer_tools.measure.synthetic.topics import Topics

#: 128 experts of 324 KiB, three reads each.
SHAPE = Shape("qwen3moe", 4, 512, 8, 2, 64, 384, 2048, 1e6, experts=32, used=4)
TOKENS = 48
#: A hash of each token's logits, one a line; "path" is changed as it says after so many tokens.
SCRIPT = """
import os, sys, zlib
from powerinfer_tools.detect import resident_bytes
from powerinfer_tools.engine import Engine
from powerinfer_tools.engine.from_disk import RamOptions
from powerinfer_tools.errors import PowerInferError
from powerinfer_tools.interrupts import guard_mapped_files
from powerinfer_tools.model.loading import load_model
path, ram, tokens, change = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
guard_mapped_files(1)
try:
    model = load_model(path)
    options = RamOptions(resident_bytes() + ram) if ram else None
    engine = Engine(model, context=128, batch=8, threads=2, ram=options)
    for step in range(tokens):
        print(zlib.crc32(engine.decode(37 * step % 2000).tobytes()), flush=True)
        if step == 5 and change == "truncate":
            os.truncate(path, os.path.getsize(path) // 2)
        if step == 5 and change == "write":
            with open(path, "r+b") as file:
                file.seek(-4096, 2)
                file.write(bytes(4096))
        if step == 5 and change == "replace":
            os.replace(path + ".other", path)
    print("from disk" if engine.stack.residency else "in memory", file=sys.stderr)
except PowerInferError as error:
    print(f"powerinfer: {error}", file=sys.stderr)
    sys.exit(1)
"""
#: Reads of weights that fail, or bring less than was asked for, as a disk under stress may.
SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <linux/aio_abi.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/types.h>
static atomic_long count;
static ssize_t read_at(int file, void *to, size_t bytes, off_t offset) {
    static ssize_t (*real)(int, void *, size_t, off_t);
    if (!real) *(void **)&real = dlsym(RTLD_NEXT, "pread64");
    const char *every = getenv("TEST_FAIL_EVERY"), *shorter = getenv("TEST_SHORT");
    const char *least = getenv("TEST_LEAST");
    if (bytes >= (least ? (size_t)atol(least) : 16384)) {
        const long number = ++count;
        if (every && number % atol(every) == 0) return errno = EIO, -1;
        if (shorter && number % 3 == 0) return errno = EINTR, -1;
        if (shorter && number % 2 == 0) bytes = bytes / 2 / 4096 * 4096;
    }
    return real(file, to, bytes, offset);
}
/* Asynchronous reads: those that have arrived are told to have failed. */
long syscall(long number, ...) {
    static long (*real)(long, ...);
    if (!real) *(void **)&real = dlsym(RTLD_NEXT, "syscall");
    long a[6];
    va_list rest;
    va_start(rest, number);
    for (int i = 0; i < 6; i++) a[i] = va_arg(rest, long);
    va_end(rest);
    if (number == SYS_io_setup && getenv("TEST_NO_AIO")) return errno = ENOSYS, -1;
    const long result = real(number, a[0], a[1], a[2], a[3], a[4], a[5]);
    const char *every = getenv("TEST_FAIL_EVERY");
    for (long i = 0; number == SYS_io_getevents && every && i < result; i++)
        if (++count % atol(every) == 0) ((struct io_event *)a[3])[i].res = -EIO;
    return result;
}
ssize_t pread(int file, void *to, size_t bytes, off_t offset) { return read_at(file, to, bytes, offset); }
ssize_t pread64(int file, void *to, size_t bytes, off_t offset) { return read_at(file, to, bytes, offset); }
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("faults") / "moe.gguf"
    write_synthetic(path, "test", SHAPE, "Q4_0", topics=Topics(2.0, 0.5))
    return path


def run(
    path: Path, ram: int, change: str = "", tokens: int = TOKENS, **variables: str
) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | variables
    command = [sys.executable, "-c", SCRIPT, str(path), str(ram), str(tokens), change]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def half(path: Path) -> int:
    """Memory beside the process for half of the model."""
    return (36 << 20) + path.stat().st_size // 2


@pytest.fixture(scope="module")
def expected(model: Path) -> list[str]:
    ended = run(model, 0)
    assert (ended.returncode, ended.stderr.strip()) == (0, "in memory")
    return ended.stdout.split()


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> str:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler is here to make a disk fail with")
    folder = tmp_path_factory.mktemp("shim")
    (folder / "shim.c").write_text(SHIM)
    library = folder / "shim.so"
    command = [compiler, "-shared", "-fPIC", "-O1", str(folder / "shim.c"), "-o", str(library), "-ldl"]
    subprocess.run(command, check=True)
    return str(library)


def one_line(ended: subprocess.CompletedProcess[str], path: Path) -> str:
    """The error, which must be the only one and name the file."""
    lines = ended.stderr.strip().splitlines()
    assert ended.returncode == 1, ended.stderr
    assert len(lines) == 1
    assert lines[0].startswith(f"powerinfer: {path}")
    return lines[0]


@pytest.mark.parametrize("every", [100, 300, 330])
def test_a_disk_that_fails_now_and_then(model: Path, expected: list[str], shim: str, every: int) -> None:
    """While experts are read at the beginning, or later on."""
    ended = run(model, half(model), LD_PRELOAD=shim, TEST_FAIL_EVERY=str(every))
    assert "could not be read while the model ran: Input/output error" in one_line(ended, model)
    given = ended.stdout.split()
    assert given == expected[: len(given)]
    assert (len(given) > 0) == (every > 200)


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """6 layers of 4,096 neurons, a tenth of which fires; single ones are read in two pages or three."""
    path = tmp_path_factory.mktemp("faults") / "sparse.powerinfer.gguf"
    sizes = {"layers": 6, "width": 512, "heads": 8, "kv_heads": 2, "head_dim": 64, "neurons": 4096}
    shape = replace(SHAPES["mistral-7b"], **sizes, vocabulary=2048)  # type: ignore[arg-type]
    write_sparse(path, "test", shape, "Q4_0", Sparsity(0.1, 0.3))
    return path


@pytest.mark.parametrize("every", [100, 1500])
def test_a_disk_that_fails_under_single_neurons(sparse: Path, shim: str, every: int) -> None:
    """The same of a sparse model: while neurons are tried at the beginning, or later on."""
    expected = run(sparse, 0)
    assert expected.stderr.strip() == "in memory"
    failing = {"LD_PRELOAD": shim, "TEST_FAIL_EVERY": str(every), "TEST_LEAST": "4096"}
    ended = run(sparse, half(sparse), **failing)
    assert "could not be read while the model ran: Input/output error" in one_line(ended, sparse)
    printed = ended.stdout.split()
    assert printed == expected.stdout.split()[: len(printed)]
    assert (len(printed) > 0) == (every > 1000)


def test_neurons_without_asynchronous_reads(sparse: Path, shim: str) -> None:
    """Where the system has none, threads read what they lay out: the same bits."""
    expected = run(sparse, 0)
    ended = run(sparse, half(sparse), LD_PRELOAD=shim, TEST_NO_AIO="1")
    assert (ended.returncode, ended.stderr.strip()) == (0, "from disk")
    assert ended.stdout == expected.stdout


def test_short_reads_are_read_on(model: Path, expected: list[str], shim: str) -> None:
    ended = run(model, half(model), LD_PRELOAD=shim, TEST_SHORT="1")
    assert (ended.returncode, ended.stderr.strip()) == (0, "from disk")
    assert ended.stdout.split() == expected


@pytest.mark.parametrize("change", ["truncate", "write", "replace"])
def test_a_file_that_changes_under_way(model: Path, expected: list[str], tmp_path: Path, change: str) -> None:
    """Cut short or written to, it ends the run; another file in its place is not the one that is open."""
    path = tmp_path / "moe.gguf"
    shutil.copyfile(model, path)
    (tmp_path / "moe.gguf.other").write_bytes(bytes(1 << 20))
    ended = run(path, half(model), change)
    given = ended.stdout.split()
    if change == "replace":
        assert (ended.returncode, given) == (0, expected)
        return
    one_line(ended, path)
    assert 6 <= len(given) < TOKENS
    assert given == expected[: len(given)]


@pytest.fixture
def limit() -> Iterator[Path]:
    """A cgroup of our own."""
    roots = [Path("/sys/fs/cgroup")]
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        number, controllers, below = line.split(":", 2)
        if "memory" in controllers.split(","):
            roots.insert(0, Path(f"/sys/fs/cgroup/memory{below}"))
        elif number == "0" and not controllers:
            roots.append(Path(f"/sys/fs/cgroup{below}"))
    for root in roots:
        folder = root / f"powerinfer-test-{os.getpid()}"
        try:
            folder.mkdir()
        except OSError:
            continue
        if (folder / "memory.limit_in_bytes").exists() or (folder / "memory.max").exists():
            yield folder
            folder.rmdir()
            return
        folder.rmdir()
    pytest.skip("no cgroup with a limit of memory can be made here")


def test_within_a_cgroup(model: Path, expected: list[str], limit: Path) -> None:
    """With 110 MiB and half of the model, page cache counted, the kernel has nobody to kill."""
    nbytes = (110 << 20) + model.stat().st_size // 2
    name = "memory.max" if (limit / "memory.max").exists() else "memory.limit_in_bytes"
    try:
        (limit / name).write_text(str(nbytes))
    except OSError as error:
        pytest.skip(f"the limit of a cgroup cannot be set here: {error}")
    script = SCRIPT.replace(
        "import os, sys, zlib\n",
        f"import os, sys, zlib\nopen('{limit}/cgroup.procs', 'w').write(str(os.getpid()))\n",
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script, str(model), str(half(model)), str(TOKENS), ""]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert (ended.returncode, ended.stderr.strip()) == (0, "from disk")
    assert ended.stdout.split() == expected
