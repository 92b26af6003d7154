"""Neurons on disk: sums are those of a packed bundle for every budget, what is not named is not read, and
faults are named."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from powerinfer_kernels import (
    Activations,
    Bundle,
    KernelError,
    LayerOfRecords,
    Pool,
    Program,
    ProgramBuilder,
    Records,
    RecordsOf,
    RowType,
    UnitsFile,
    aligned,
    quantize,
    row_bytes,
)

LAYERS, NEURONS, WIDTH, TOKENS, FIRST = 2, 203, 96, 16, 192
RNG = np.random.default_rng(5)
#: A gate row of each record, which gate-first does not read, then up and down rows.
TYPES = (RowType.Q8_0, RowType.Q4_0, RowType.Q8_0)
SIZES = [row_bytes(int(kind), WIDTH) for kind in TYPES]
BYTES = sum(SIZES) + 20
VALUES = RNG.standard_normal((LAYERS, 3, NEURONS, WIDTH), dtype=np.float32)
ROWS = [[quantize(part, int(kind)) for part, kind in zip(layer, TYPES, strict=True)] for layer in VALUES]
#: Budgets in pages: a layer and a little, up to all.
PAGES = (14, 18, 22, 26, 60)


class OnDisk:
    """Two layers in a file, and a program that adds up the neurons of both whose gates are positive."""

    def __init__(self, folder: Path, pages: int, fixed: int = 0, *, gates: bool = False) -> None:
        self.path, self.pool, self.records = folder / "neurons", Pool(2), Records()
        records = np.full((LAYERS, NEURONS, BYTES), 0xEE, np.uint8)
        for layer, parts in enumerate(ROWS):
            at = 0
            for rows in parts:
                records[layer, :, at : at + rows.shape[1]] = rows
                at += rows.shape[1]
        self.path.write_bytes(b"\xff" * FIRST + records.tobytes())
        kinds = TYPES if gates else (None, *TYPES[1:])
        bundles = [Bundle.absent(self.pool, NEURONS, WIDTH, kinds) for _ in range(LAYERS)]
        rows = (0 if gates else None, SIZES[0], SIZES[0] + SIZES[1])
        layers = [
            LayerOfRecords(bundle, 0, FIRST + k * NEURONS * BYTES, BYTES, rows, fixed)
            for k, bundle in enumerate(bundles)
        ]
        self.open = lambda: self.records.open(
            [UnitsFile(os.open(self.path, os.O_RDONLY), False)], layers, pages, 1 << 20
        )
        self.open()
        self.program = self._program(bundles, of=self.records, gates=gates)
        packed = [
            Bundle.pack(
                self.pool,
                NEURONS,
                WIDTH,
                gate=(parts[0], TYPES[0]) if gates else None,
                up=(parts[1], TYPES[1]),
                down=(parts[2], TYPES[2]),
            )
            for parts in ROWS
        ]
        disk = self.outs
        self.expected = self._program(packed, of=None, gates=gates)
        self.outs, self.expected_outs = disk, self.outs

    def _program(self, bundles: list[Bundle], of: Records | None, *, gates: bool) -> Program:
        builder, self.outs = ProgramBuilder(TOKENS), []
        if of is not None:
            self.select = [aligned((TOKENS, NEURONS), np.float32) for _ in range(LAYERS)]
            self.x = aligned((TOKENS, WIDTH), np.float32)
            self.x[:] = RNG.standard_normal((TOKENS, WIDTH))
        acts = Activations(TOKENS, WIDTH)
        builder.quantize(self.x, acts)
        for layer, bundle in enumerate(bundles):
            out, h = (aligned((TOKENS, size), np.float32) for size in (WIDTH, NEURONS))
            gate = aligned((TOKENS, NEURONS), np.float32) if gates else None
            if of is not None:
                builder.fetch_records(RecordsOf(of, layer), self.select[layer], neurons=NEURONS)
            builder.sparse_ffn(self.select[layer], self.x, acts, bundle, out, h, "relu", gate=gate)
            self.outs.append(out)
        return builder.build()

    def run(self, tokens: int, density: float) -> None:
        """Compute with other gates, and compare with bundles in memory, bit for bit."""
        for select in self.select:
            select[:] = np.where(RNG.random((TOKENS, NEURONS)) < density, RNG.random((TOKENS, NEURONS)), -1)
        for program in (self.program, self.expected):
            program.run(self.pool, 0, program.operations, tokens)
        for got, wanted in zip(self.outs, self.expected_outs, strict=True):
            assert np.array_equal(got[:tokens], wanted[:tokens])
            assert density < 0.1 or np.any(got[:tokens])

    def close(self) -> None:
        self.records.close()
        self.pool.close()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[OnDisk]:
    made = OnDisk(tmp_path, PAGES[0])
    yield made
    made.close()


@pytest.mark.parametrize("gates", [False, True], ids=("gate-first", "predicted"))
@pytest.mark.parametrize("pages", PAGES)
def test_sums_are_those_in_memory(tmp_path: Path, pages: int, gates: bool) -> None:
    """One token, the union of a few, and prompts, which take all neurons; with some that stay."""
    disk = OnDisk(tmp_path, pages + (8 if gates else 0), fixed=0 if pages == PAGES[0] else 7, gates=gates)
    for at in range(LAYERS):
        disk.records.load(disk.pool, at, np.arange(7, dtype=np.int32))
    for tokens, density in ((1, 0.1), (3, 0.05), (1, 0.5), (7, 0.9), (TOKENS, 0.1), (1, 0.02), (2, 0.1)):
        for _ in range(4):
            disk.run(tokens, density)
    counters = disk.records.counters()
    assert counters.read_bytes > 0
    assert counters.moved == 0 if pages == PAGES[-1] else counters.moved > 0 or pages > PAGES[1]
    disk.close()


def test_only_what_is_named_is_read(disk: OnDisk) -> None:
    """Neighbours come with one read; what is there is not read again."""
    for select in disk.select:
        select[:] = -1
    disk.select[0][0, [3, 4, 9]] = 1
    run = lambda: disk.program.run(disk.pool, 0, disk.program.operations, 1)  # noqa: E731
    run()
    each = SIZES[1] + SIZES[2]  # of the record, gate and padding are left out
    counters = disk.records.counters()
    assert counters.read_bytes == BYTES + each + each
    assert (counters.taken, counters.hits) == (3, 0)
    run()
    assert disk.records.counters().read_bytes == counters.read_bytes
    assert disk.records.counters().hits == 3
    assert disk.records.taken(0)[[2, 3, 4, 9]].tolist() == [0, 2, 2, 2]
    disk.records.reset()
    assert disk.records.counters().taken == 0


def test_what_comes_ahead_is_a_hit(tmp_path: Path) -> None:
    disk = OnDisk(tmp_path, PAGES[-1])
    builder, select = ProgramBuilder(1), aligned((1, NEURONS), np.float32)
    of = RecordsOf(disk.records, 1)
    builder.fetch_records(of, select, neurons=NEURONS, when="soon")
    builder.fetch_records(of, select, neurons=NEURONS)
    select[0, ::3] = 1
    program = builder.build()
    program.run(disk.pool, 0, program.operations, 1)
    counters = disk.records.counters()
    count = len(range(0, NEURONS, 3))
    assert (counters.ahead, counters.ahead_used) == (count, count)
    assert counters.hits + counters.late == counters.taken == count
    disk.close()


def test_what_stays_is_never_read_again(tmp_path: Path) -> None:
    disk = OnDisk(tmp_path, 20, fixed=60)
    for at in range(LAYERS):
        disk.records.load(disk.pool, at, np.arange(60, dtype=np.int32))
    for _ in range(20):
        disk.run(1, 0.4)
    disk.records.reset()
    for select in disk.select:
        select[:] = -1
        select[:, :60] = 1
    disk.program.run(disk.pool, 0, disk.program.operations, 1)
    counters = disk.records.counters()
    assert counters.hits == counters.taken == 2 * 60
    disk.close()


def test_a_layer_that_does_not_fit_is_an_error(tmp_path: Path) -> None:
    disk = OnDisk(tmp_path, 3)
    with pytest.raises(KernelError, match="weights on disk could not be brought into memory"):
        disk.run(TOKENS, 1.0)
    assert disk.records.fault() is None
    disk.close()


def test_a_file_that_ends_is_named(tmp_path: Path) -> None:
    disk = OnDisk(tmp_path, PAGES[-1])
    os.truncate(disk.path, FIRST + 10 * BYTES)
    with pytest.raises(KernelError, match="weights on disk could not be brought into memory"):
        disk.run(TOKENS, 1.0)
    fault = disk.records.fault()
    assert fault is not None
    assert fault.reason in ("the file ends there", "the file was changed since it was opened")
    assert fault.file == 0
    disk.close()


def test_closed_records_are_an_error(disk: OnDisk) -> None:
    disk.records.close()
    with pytest.raises(KernelError, match="weights on disk could not be brought into memory"):
        disk.run(1, 0.5)
    with pytest.raises(KernelError, match="the records are not open"):
        disk.records.counters()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"file": 1}, "do not fit their bundle"),
        ({"nbytes": SIZES[0]}, "do not fit their bundle"),
        ({"offset": -1}, "do not fit their bundle"),
        ({"fixed": NEURONS + 1}, "do not fit their bundle"),
        ({"rows": (0, 8, 8)}, "other rows than their bundle"),
        ({"bundle": None}, "do not fit their bundle"),
    ],
)
def test_layers_that_cannot_be(change: dict[str, object], match: str, tmp_path: Path) -> None:
    pool, path = Pool(1), tmp_path / "empty"
    path.write_bytes(b"")
    if "bundle" in change:
        rows = ROWS[0]
        packed = Bundle.pack(pool, NEURONS, WIDTH, up=(rows[1], TYPES[1]), down=(rows[2], TYPES[2]))
        change = {"bundle": packed}
    bundle = Bundle.absent(pool, NEURONS, WIDTH, (None, *TYPES[1:]))
    right = LayerOfRecords(bundle, 0, 0, BYTES, (None, SIZES[0], SIZES[0] + SIZES[1]), 0)
    descriptor = os.open(path, os.O_RDONLY)
    with pytest.raises(KernelError, match=match):
        Records().open([UnitsFile(descriptor, False)], [right._replace(**change)], 10, 1 << 20)  # type: ignore[arg-type]
    os.close(descriptor)
    pool.close()
