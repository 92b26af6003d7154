"""What the Python face refuses, and what the pool survives."""

import os
import platform
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from powerinfer_kernels import (
    Activations,
    Bundle,
    KernelError,
    KVCache,
    Matrix,
    Pool,
    ProgramBuilder,
    RowMatrix,
    RowType,
    State,
    aligned,
    available_isas,
    physical_cores,
    read_bandwidth,
    row_bytes,
)


def floats(*shape: int) -> np.ndarray:
    return aligned(shape, np.float32)


def frozen(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


#: Memory that two views of the table below overlap in.
OVERLAP = floats(3 * 8)
BAD: dict[str, tuple[Callable[[ProgramBuilder], None], str]] = {
    "wrong width": (lambda b: b.add(floats(2, 8), floats(2, 9)), "out must be"),
    "wrong tokens": (lambda b: b.add(floats(3, 8), floats(2, 8)), "src must be"),
    "wrong type": (lambda b: b.add(np.zeros((2, 8)), floats(2, 8)), "src must be"),
    "not an array": (lambda b: b.add([[1.0]], floats(2, 8)), "src must be"),  # type: ignore[arg-type]
    "not contiguous": (lambda b: b.add(floats(8, 2).T, floats(2, 8)), "C-contiguous"),
    "read-only": (lambda b: b.add(floats(2, 8), frozen(floats(2, 8))), "read-only"),
    "overlap": (lambda b: b.add(OVERLAP[:16].reshape(2, 8), OVERLAP[8:].reshape(2, 8)), "share memory"),
    "unknown activation": (lambda b: b.activate(floats(2, 8), None, floats(2, 8), "swish"), "swish"),
    "unknown rope": (lambda b: b.rope(floats(2, 8), floats(4, 2), floats(4, 2), 2, 4, "x"), "rope style"),
    "rotary too wide": (lambda b: b.rope(floats(2, 8), floats(4, 3), floats(4, 3), 2, 4, "neox"), "rotary"),
    "groups": (lambda b: b.rms_norm(floats(2, 8), None, floats(2, 8), 1e-5, groups=3), "groups"),
    "eps": (lambda b: b.rms_norm(floats(2, 8), None, floats(2, 8), float("nan")), "eps"),
    "heads": (lambda b: b.attention(floats(2, 12), b.kv_slot(8, 2, 4), floats(2, 12), 3, 1.0), "multiple"),
    "window": (lambda b: b.attention(floats(2, 8), b.kv_slot(8, 2, 4), floats(2, 8), 2, 1.0, -1), "window"),
    "activations": (lambda b: b.quantize(floats(2, 64), Activations(1, 64)), "do not fit"),
    "no zeros": (lambda b: sparse(b, kind="silu"), "exact zeros"),
    "rows differ": (lambda b: sparse(b, select=floats(2, 2)), "select must be"),
    "no down rows": (lambda b: sparse(b, bundle=bundle("up")), "no down rows"),
    "no gate rows": (lambda b: sparse(b, gate=floats(2, 3)), "no gate rows"),
    "gate rows unused": (lambda b: sparse(b, bundle=bundle("gate", "up", "down")), "must not have gate"),
    "threshold": (lambda b: sparse(b, threshold=floats(2, 3)), "threshold must be"),
    "bias without gate": (lambda b: sparse(b, bias=floats(3)), "there are none"),
    "bias": (
        lambda b: sparse(b, bundle=bundle("gate", "down"), gate=floats(2, 3), bias=floats(4)),
        "bias must be",
    ),
    "vector too short": (lambda b: b.add(floats(7), floats(2, 8)), "src must be"),
    "cut of relu": (lambda b: sparse(b, cut=0.5), "does not go with relu"),
    "negative cut": (lambda b: sparse(b, kind="fatrelu", cut=-1.0), "not negative"),
    "sum without rows": (lambda b: b.sum_rows(floats(2, 3), bundle("up"), floats(2, 4)), "no down rows"),
}


def bundle(*kinds: str) -> Bundle:
    """Three neurons of four float columns."""
    with Pool(1) as pool:
        return Bundle.pack(pool, 3, 4, **{kind: (floats(3, 4), RowType.F32) for kind in kinds})


def sparse(builder: ProgramBuilder, kind: str = "relu", **changes: Any) -> None:
    """sparse_ffn with what `changes` says instead of what fits."""
    arguments: dict[str, Any] = {"select": floats(2, 3), "src": floats(2, 4), "activations": None}
    arguments |= {"bundle": bundle("up", "down"), "out": floats(2, 4), "h": floats(2, 3)}
    builder.sparse_ffn(**(arguments | changes), kind=kind)


@pytest.mark.parametrize("case", sorted(BAD))
def test_operations_refuse(case: str) -> None:
    append, message = BAD[case]
    with pytest.raises(KernelError, match=message):
        append(ProgramBuilder(2))


@pytest.mark.parametrize("tokens", [1, 5, 12])
def test_rows_of_a_bundle_that_other_operations_read(tokens: int) -> None:
    """Gate rows of another type, of which nothing is a number: gate-first does not see them."""
    rng = np.random.default_rng(tokens)
    neurons, columns, results = 40, 32, []
    select, src = (rng.standard_normal((tokens, n)).astype(np.float32) for n in (neurons, columns))
    rows = {
        kind: (rng.standard_normal((neurons, columns)).astype(np.float32), RowType.F32)
        for kind in ("up", "down")
    }
    poison = (np.full((neurons, row_bytes(RowType.Q8_0, columns)), 0xFF, np.uint8), RowType.Q8_0)
    with Pool(1) as pool:
        alone = Bundle.pack(pool, neurons, columns, **rows)
        more = Bundle.pack(pool, neurons, columns, gate=poison, **rows)
        shared = more.only(up=True, down=True)
        assert shared.types == alone.types
        assert shared.gate_nbytes == 0
        assert alone.nbytes <= shared.nbytes < more.nbytes
        with pytest.raises(KernelError, match="no such rows"):
            alone.only(gate=True)
        for bundle in (alone, shared):
            builder, out = ProgramBuilder(tokens), floats(tokens, columns)
            builder.sparse_ffn(select, src, None, bundle, out, floats(tokens, neurons), "relu")
            builder.build().run(pool, 0, builder.mark(), tokens, 0)
            results.append(out.tobytes())
    assert results[0] == results[1]
    assert np.any(np.frombuffer(results[0], np.float32))


def test_buffers_refuse() -> None:
    with Pool(1) as pool:
        for source, row_type, count, columns, message in (
            (np.zeros(10, np.uint8), RowType.F32, 1, 3, "12 bytes"),
            (np.zeros(34, np.uint8), RowType.Q8_0, 1, 31, "multiple of 32"),
            (np.zeros(34, np.uint8), 99, 1, 32, "not supported"),
            (np.zeros((4, 34), np.uint8)[:, ::2], RowType.Q8_0, 2, 32, "C-contiguous"),
        ):
            with pytest.raises(KernelError, match=message):
                Matrix.pack(pool, source, row_type, count, columns)
            with pytest.raises(KernelError, match=message):
                Bundle.pack(pool, count, columns, up=(source, row_type))
        with pytest.raises(KernelError, match="no rows at all"):
            Bundle.pack(pool, 1, 32)
    for make in (
        lambda: Activations(1, 33),
        lambda: KVCache(8, 1, 3),
        lambda: KVCache(8, 1, 1026),
        lambda: KVCache(8, 1, 4, value_dim=3),
        lambda: KVCache(8, 1, 64, "q8_0", value_dim=48),
        lambda: KVCache(0, 1, 4),
        lambda: KVCache(8, 1, 48, "q8_0"),
        lambda: KVCache(8, 1, 64, "q4_0"),
        lambda: RowMatrix(np.zeros(30, np.uint8), RowType.F32, 2, 4),
        lambda: RowMatrix(np.zeros(64, np.uint8), RowType.F32, 2, 4, stride=8),
        lambda: RowMatrix(np.zeros(65, np.uint8)[1:], RowType.F32, 2, 4),
        lambda: ProgramBuilder(0),
        lambda: aligned((1 << 40, 1 << 40), np.uint8),
    ):
        with pytest.raises(KernelError):
            make()


def adding() -> tuple[ProgramBuilder, np.ndarray]:
    """out += 1, for two tokens in a context of four."""
    builder, out = ProgramBuilder(2), floats(2, 64)
    one = floats(2, 64)
    one[:] = 1
    builder.add(one, out)
    builder.store_kv(one, one, builder.kv_slot(4, 1, 64))
    return builder, out


@pytest.mark.parametrize(
    ("first", "last", "tokens", "position"),
    [(-1, 1, 1, 0), (0, 3, 1, 0), (2, 1, 1, 0), (0, 1, 0, 0), (0, 1, 3, 0), (0, 1, 1, -1), (0, 1, 2, 3)],
)
def test_runs_outside_the_program_change_nothing(first: int, last: int, tokens: int, position: int) -> None:
    builder, out = adding()
    with Pool(1) as pool, pytest.raises(KernelError):
        builder.build().run(pool, first, last, tokens, position)
    assert not out.any()


def test_times_are_added_up_and_reset() -> None:
    builder, _ = adding()
    program = builder.build()
    with Pool(2) as pool:
        for _ in range(10):
            program.run(pool, 0, 2, 2, 0, State([KVCache(4, 1, 64)]))
    assert (program.nanoseconds() > 0).all()
    program.reset_counters()
    assert not program.nanoseconds().any()


def test_a_closed_pool_refuses() -> None:
    builder, _ = adding()
    pool = Pool(2)
    pool.close()
    with pytest.raises(KernelError):
        builder.build().run(pool, 0, 1, 1, 0)


@pytest.mark.parametrize("threads", [0, -1, 100_000])
def test_impossible_numbers_of_threads(threads: int) -> None:
    with pytest.raises(KernelError):
        Pool(threads)


def test_more_threads_than_cores() -> None:
    builder, out = adding()
    program = builder.build()
    with Pool(8) as pool:
        for _ in range(200):
            program.run(pool, 0, 2, 2, 0, State([KVCache(4, 1, 64)]))
    assert (out == 200).all()


def test_an_idle_pool_uses_no_processor() -> None:
    builder, _ = adding()
    with Pool(2) as pool:
        builder.build().run(pool, 0, 1, 1, 0)
        before = time.process_time()
        time.sleep(0.5)
        assert time.process_time() - before < 0.25  # a thread that spins would use 0.5 s


def test_two_python_threads_share_a_pool() -> None:
    pairs = [adding() for _ in range(4)]
    with Pool(2) as pool:

        def work(builder: ProgramBuilder) -> None:
            program = builder.build()
            for _ in range(300):
                program.run(pool, 0, 1, 2, 0)

        workers = [threading.Thread(target=work, args=(builder,)) for builder, _ in pairs]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert all((out == 300).all() for _, out in pairs)


def test_a_forked_child_computes() -> None:
    """The child has none of the parent's threads; its pool starts its own."""
    builder, out = adding()
    program = builder.build()
    with Pool(2) as pool:
        program.run(pool, 0, 1, 2, 0)
        child = os.fork()
        if child == 0:
            program.run(pool, 0, 1, 2, 0)
            os._exit(0 if (out == 2).all() else 1)
        deadline = time.monotonic() + 30
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
            time.sleep(0.01)
        if ended == (0, 0):
            os.kill(child, 9)
            os.waitpid(child, 0)
        assert ended == (child, 0)
    assert (out == 1).all()


def test_isa_is_forced_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for isa in available_isas():
        monkeypatch.setenv("POWERINFER_ISA", isa)
        assert Pool(1).isa == isa
    monkeypatch.setenv("POWERINFER_ISA", "mmx")
    with pytest.raises(KernelError, match=r"'mmx' .* available: .*scalar"):
        Pool(1)


NEEDED_FLAGS = {
    "avx2": {"avx2", "fma", "f16c"},
    "avxvnni": {"avx2", "fma", "f16c", "avx_vnni"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx2", "fma", "f16c"},
}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flags are those of x86-64")
def test_instruction_sets_are_those_that_the_kernel_reports() -> None:
    """Linux shows the flags of which it saves the registers: our own reading of the CPU has to agree."""
    lines = Path("/proc/cpuinfo").read_text(encoding="ascii").splitlines()
    flags = set(next(line for line in lines if line.startswith("flags")).split(":")[1].split())
    expected = [isa for isa, needed in NEEDED_FLAGS.items() if needed <= flags]
    assert sorted(available_isas()) == sorted([*expected, "scalar"])


def test_bandwidth_and_cores() -> None:
    assert 1 <= physical_cores() <= (os.cpu_count() or 1)
    with Pool(2) as pool:
        assert read_bandwidth(pool, 1 << 20, 0.01) > 0
        assert read_bandwidth(pool, 4 << 20, 0.01, huge_pages=False) > 0
        for nbytes, seconds in ((0, 0.1), (-1, 0.1), (1 << 20, -1.0)):
            with pytest.raises(KernelError):
                read_bandwidth(pool, nbytes, seconds)
