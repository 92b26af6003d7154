"""How fast memory can be read, and how near to that products of single large matrices come."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from powerinfer_kernels import (
    Activations,
    Matrix,
    Pool,
    Program,
    ProgramBuilder,
    RowType,
    aligned,
    read_bandwidth,
    row_bytes,
)
from powerinfer_tools.measure.synthetic.random_blocks import random_rows

ROW_TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "F16")
COLUMNS = 4096
#: Of one matrix: several times what the caches that these threads share usually hold.
MATRIX_BYTES = 320 << 20
PROBE, NORMAL_PAGES = "probe, huge pages", "probe, 4 KiB pages"


@dataclass(frozen=True)
class KernelRow:
    """Bytes of weights per second, median; ``share`` of the probe beside it, median over repetitions."""

    name: str
    threads: int
    bytes_per_second: float
    share: float


def measure_kernels(threads: Sequence[int], repetitions: int) -> list[KernelRow]:
    """The probe with both kinds of pages and one product per row type, in turn, for each thread count."""
    rows: list[KernelRow] = []
    for count in threads:
        with Pool(count) as pool:
            rows += _measure(pool, repetitions)
    return rows


def _measure(pool: Pool, repetitions: int) -> list[KernelRow]:
    cases = {name: _Product(pool, RowType[name]) for name in ROW_TYPES}
    rates: dict[str, list[float]] = {name: [] for name in (PROBE, NORMAL_PAGES, *cases)}
    for repetition in range(repetitions + 1):
        found = {
            PROBE: read_bandwidth(pool, MATRIX_BYTES, 0.1),
            NORMAL_PAGES: read_bandwidth(pool, MATRIX_BYTES, 0.1, huge_pages=False),
        }
        found |= {name: case.rate(pool) for name, case in cases.items()}
        for name, rate in found.items() if repetition else ():
            rates[name].append(rate)
    probe = rates[PROBE]
    return [
        KernelRow(
            name,
            pool.threads,
            median(values),
            median(value / most for value, most in zip(values, probe, strict=True)),
        )
        for name, values in rates.items()
    ]


class _Product:
    """One matrix with one token's activations."""

    def __init__(self, pool: Pool, row_type: RowType) -> None:
        count = MATRIX_BYTES // row_bytes(row_type, COLUMNS) // 16 * 16
        pattern = random_rows(np.random.default_rng(1), row_type.name, 64, COLUMNS)
        rows = np.resize(pattern, (count, pattern.shape[1]))
        self._matrix = Matrix.pack(pool, rows, row_type, count, COLUMNS)
        source, out = aligned((1, COLUMNS), np.float32), aligned((1, count), np.float32)
        source[:] = 1.0
        acts = Activations(1, COLUMNS)
        builder = ProgramBuilder(1)
        builder.quantize(source, acts)
        builder.matmul(self._matrix, source, acts, out)
        self._program: Program = builder.build()

    def rate(self, pool: Pool) -> float:
        """Bytes per second of the best of three passes, as the probe counts."""
        seconds = []
        for _ in range(3):
            started = time.perf_counter()
            self._program.run(pool, 0, self._program.operations, 1, 0)
            seconds.append(time.perf_counter() - started)
        return self._matrix.nbytes / min(seconds)
