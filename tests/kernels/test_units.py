"""Units on disk: what is in memory follows use, products are those of packed matrices, faults are named."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from powerinfer_kernels import (
    Activations,
    Choice,
    ExpertBuffers,
    ExpertWeights,
    KernelError,
    Matrix,
    Part,
    Pool,
    Program,
    ProgramBuilder,
    Units,
    UnitsFile,
    aligned,
)

EXPERTS, USED, WIDTH, NEURONS, TOKENS = 6, 2, 64, 48, 3
#: Where rows begin in the file: nowhere near a page.
FIRST = 4096 * 3 + 32
RNG = np.random.default_rng(3)
GATE, UP, DOWN = (
    RNG.standard_normal((EXPERTS, *shape), dtype=np.float32)
    for shape in ((NEURONS, WIDTH), (NEURONS, WIDTH), (WIDTH, NEURONS))
)


class OnDisk:
    """Experts of float32 in a file, as units, and a program that sums those of a choice."""

    def __init__(self, folder: Path, slots: int, half_life: float = 0.0, threads: int = 3) -> None:
        self.path, self.pool, self.units = folder / "experts", Pool(2), Units()
        data = [np.ascontiguousarray(stack) for stack in (GATE, UP, DOWN)]
        self.path.write_bytes(b"\xff" * FIRST + b"".join(part.tobytes() for part in data))
        matrices, offset = [], FIRST
        for rows, columns in ((NEURONS, WIDTH), (NEURONS, WIDTH), (WIDTH, NEURONS)):
            size = rows * columns * 4
            made = [Matrix.absent(self.pool, 0, rows, columns) for _ in range(EXPERTS)]
            matrices.append([Part(matrix, 0, 0, offset + e * size) for e, matrix in enumerate(made)])
            offset += EXPERTS * size
        for parts in zip(*matrices, strict=True):
            self.units.add(parts)
        self.choice = Choice.new(TOKENS, EXPERTS, USED)
        self.ahead = replace(self.choice, chosen=aligned((TOKENS, USED), np.int32))
        self.x, self.out = (aligned((TOKENS, WIDTH), np.float32) for _ in range(2))
        self.x[:] = np.random.default_rng(4).standard_normal((TOKENS, WIDTH))
        gate, up, down = ([part.matrix for part in parts] for parts in matrices)
        builder = ProgramBuilder(TOKENS)
        builder.fetch(self.units, 0, self.choice, [(0, self.ahead)])
        buffers = ExpertBuffers.new(TOKENS * USED, WIDTH, NEURONS, gated=True)
        acts = Activations(TOKENS, WIDTH)
        weights = ExpertWeights(gate, up, down)
        builder.experts(self.choice, self.x, acts, weights, buffers, self.out, "silu")
        self.units.open([UnitsFile(os.open(self.path, os.O_RDONLY), False)], [slots], threads, half_life)
        self.program: Program = builder.build()

    def run(self, chosen: list[list[int]], ahead: list[list[int]] | None = None) -> np.ndarray:
        """What the experts ``chosen`` by each token add up to."""
        count = len(chosen)
        self.choice.chosen[:count] = chosen
        self.choice.weights[:count] = 0.5
        self.ahead.chosen[:count] = chosen if ahead is None else ahead
        self.program.run(self.pool, 0, self.program.operations, count)
        return self.out[:count].copy()

    def close(self) -> None:
        self.units.close()
        self.pool.close()


def expected(x: np.ndarray, chosen: list[list[int]]) -> np.ndarray:
    rows = []
    for token, experts in enumerate(chosen):
        total = np.zeros(WIDTH)
        for e in experts:
            gate, up = GATE[e].astype(float) @ x[token], UP[e].astype(float) @ x[token]
            total += 0.5 * (DOWN[e].astype(float) @ (gate / (1 + np.exp(-gate)) * up))
        rows.append(total)
    return np.array(rows)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[OnDisk]:
    made = OnDisk(tmp_path, 3)
    yield made
    made.close()


def test_products_are_those_of_the_file_whatever_makes_room(disk: OnDisk) -> None:
    rng = np.random.default_rng(5)
    for _ in range(40):
        chosen = [sorted(rng.choice(EXPERTS, USED, replace=False).tolist())]
        ahead = [sorted(rng.choice(EXPERTS, USED, replace=False).tolist())]
        np.testing.assert_allclose(disk.run(chosen, ahead), expected(disk.x, chosen), rtol=1e-4, atol=1e-3)
    counters = disk.units.counters()
    assert counters.taken == 40 * USED
    assert 0 < counters.hits < counters.taken
    assert counters.moved > 0
    assert 0 < counters.ahead_used <= counters.ahead
    size = 3 * NEURONS * WIDTH * 4
    assert counters.hit_bytes == counters.hits * size
    assert counters.read_bytes % size == 0 or counters.ahead > counters.ahead_used
    assert disk.units.taken().sum() == 40 * USED


def test_least_recent_goes_first(disk: OnDisk) -> None:
    for pair in ([0, 1], [1, 2], [2, 3]):  # 0 goes for 3
        disk.run([pair])
    before = disk.units.counters()
    disk.run([[1, 2]])
    assert disk.units.counters().hits == before.hits + 2
    disk.run([[0, 1]])
    assert disk.units.counters().read_bytes == before.read_bytes + 3 * NEURONS * WIDTH * 4


def test_frequent_stay(tmp_path: Path) -> None:
    """Expert 0, taken often, outlives what was taken once since; with a short half-life it does not."""
    hits = {}
    for half_life in (1000.0, 0.1):
        (tmp_path / str(half_life)).mkdir()
        made = OnDisk(tmp_path / str(half_life), 3, half_life)
        for pair in ([0, 1], [0, 1], [1, 2], [1, 3]):
            made.run([pair])
        before = made.units.counters().hits
        made.run([[0, 1]])
        hits[half_life] = made.units.counters().hits - before
        made.close()
    assert hits == {1000.0: 2, 0.1: 1}


def test_loaded_and_fixed(disk: OnDisk) -> None:
    assert disk.units.load(np.array([5], np.int32), fixed=True) == 1
    for pair in ([0, 1], [1, 2], [2, 3], [3, 4]):
        disk.run([pair])
    before = disk.units.counters().hits
    disk.run([[4, 5]])
    assert disk.units.counters().hits == before + 2
    with pytest.raises(KernelError, match="no unit of that number"):
        disk.units.load(np.array([6], np.int32))


def test_uses_that_are_known_beforehand(tmp_path: Path) -> None:
    made = OnDisk(tmp_path, 3, 1e6)
    made.units.set_use(np.array([5.0, 0, 0, 0, 0, 0]))
    assert made.units.load(np.array([0, 1, 2, 3], np.int32)) == 3
    made.run([[3, 4]])
    before = made.units.counters().hits
    made.run([[0, 4]])
    assert made.units.counters().hits == before + 2
    made.close()


def test_more_units_in_a_pass_than_slots(disk: OnDisk) -> None:
    with pytest.raises(KernelError, match="could not be brought into memory"):
        disk.run([[0, 1], [2, 3]])
    np.testing.assert_allclose(disk.run([[4, 5]]), expected(disk.x, [[4, 5]]), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "reason"),
    [("truncate", "the file ends there"), ("write", "the file was changed since it was opened")],
)
def test_a_file_that_changes(disk: OnDisk, change: str, reason: str) -> None:
    disk.run([[0, 1]], [[0, 1]])
    with disk.path.open("r+b") as file:
        if change == "truncate":
            file.truncate(FIRST)
        else:
            os.utime(disk.path, ns=(1, 1))
    for _ in range(2):  # nothing is read any more
        with pytest.raises(KernelError, match="could not be brought into memory"):
            disk.run([[4, 5]])
    fault = disk.units.fault()
    assert fault is not None
    assert (fault.reason, fault.file) == (reason, 0)
    assert fault.offset >= FIRST
    with pytest.raises(KernelError, match="could not be brought into memory"):
        disk.units.load(np.array([2], np.int32))


def test_an_error_of_the_disk(tmp_path: Path) -> None:
    """Addresses that are no memory: the system says that they cannot be read."""
    units, pool = Units(), Pool(1)
    units.add([Part(Matrix.absent(pool, 0, 16, 32), 0, 0, 4096)])
    units.open([UnitsFile(os.open("/proc/self/mem", os.O_RDONLY), False)], [1], 1, 0.0)
    with pytest.raises(KernelError, match="could not be brought into memory"):
        units.load(np.array([0], np.int32))
    fault = units.fault()
    assert fault is not None
    assert fault.reason == os.strerror(5)
    units.close()


def test_absent_matrices_are_not_multiplied(disk: OnDisk) -> None:
    pool = disk.pool
    absent, x, out = (
        Matrix.absent(pool, 0, 16, 32),
        aligned((1, 32), np.float32),
        aligned((1, 16), np.float32),
    )
    builder = ProgramBuilder(1)
    builder.matmul(absent, x, None, out)
    with pytest.raises(KernelError, match="could not be brought into memory"):
        builder.build().run(pool, 0, 1, 1)


def test_what_cannot_be(disk: OnDisk) -> None:
    pool, units = disk.pool, Units()
    with pytest.raises(KernelError, match="a unit needs a matrix"):
        units.add([])
    units.add([Part(Matrix.absent(pool, 0, 16, 32), 0, 0, 0)])
    builder = ProgramBuilder(TOKENS)
    with pytest.raises(KernelError, match="units 0 to 6 are not among 1"):
        builder.fetch(units, 0, disk.choice)
    with pytest.raises(KernelError, match="kinds of slots"):
        units.open([], [1, 1], 1, 0.0)
    with pytest.raises(KernelError, match="does not fit its unit"):
        units.open([], [1], 1, 0.0)  # there is no file 0
    with pytest.raises(KernelError, match="not open"):
        units.counters()
    packed = Matrix.pack(pool, np.zeros((16, 32), np.float32), 0, 16, 32)
    with_memory = Units()
    with_memory.add([Part(packed, 0, 0, 0)])
    descriptor = os.open(disk.path, os.O_RDONLY)
    with pytest.raises(KernelError, match="does not fit its unit"):
        with_memory.open([UnitsFile(descriptor, False)], [1], 1, 0.0)
    os.close(descriptor)
    disk.units.close()
    with pytest.raises(KernelError, match="could not be brought into memory"):
        disk.run([[0, 1]])
