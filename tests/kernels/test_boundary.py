"""The C boundary judges what it gets: every object of every operation, handed over wrong, is an error."""

import os
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from powerinfer_kernels import (
    Activations,
    Bundle,
    KernelError,
    KVCache,
    LayerOfRecords,
    Layout,
    Matrix,
    Part,
    Pool,
    ProgramBuilder,
    Records,
    RecordsOf,
    RowType,
    Signs,
    State,
    Units,
    UnitsFile,
    _kernels,
    aligned,
    pack_signs,
    sign_code_words,
)
from powerinfer_kernels.experts_builder import Choice, ExpertBuffers, ExpertWeights
from powerinfer_kernels.program import Op
from random_rows import random_rows

TOKENS, WIDTH, NEURONS, CAPACITY = 3, 64, 96, 8
Step = tuple[Op, tuple[Any, ...], tuple[int, ...], tuple[float, ...]]


def floats(*shape: int) -> Any:
    return aligned(shape, np.float32)


def rows(row_type: RowType, count: int, columns: int) -> Any:
    return random_rows(np.random.default_rng(1), row_type, count, columns)


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(1) as opened:
        yield opened


def vectors(b: ProgramBuilder) -> None:
    x, y = floats(TOKENS, WIDTH), floats(TOKENS, WIDTH)
    b.embed(np.zeros(TOKENS, np.int32), rows(RowType.Q8_0, 10, WIDTH), RowType.Q8_0, 10, WIDTH, x)
    b.rms_norm(x, floats(WIDTH), y, 1e-5)
    b.layer_norm(x, floats(WIDTH), floats(WIDTH), y, 1e-5)
    b.l2_norm(x, y, 1e-5, groups=2)
    b.keep_top(x, y, 1.0)
    b.combine(x, floats(TOKENS, 4), y, WIDTH // 2)
    b.add(x, y)
    b.multiply(floats(TOKENS, WIDTH // 2), y, repeat=2)
    b.scale(x, 2.0)
    b.scale_by_position(x, floats(CAPACITY))
    b.copy(x, y, 8, src_first=8, out_first=16, heads=2, src_step=8, out_step=8)
    b.activate(x, y, y, "silu")
    b.keep_large(x, floats(WIDTH), y)
    squares = aligned((WIDTH,), np.float64), aligned((WIDTH,), np.float64)
    b.observe(x, y, "relu", aligned((WIDTH,), np.uint64), aligned((WIDTH, 128), np.uint32), *squares)
    code = aligned((TOKENS, sign_code_words(WIDTH)), np.uint32)
    b.sign_code(x, code)
    packed = pack_signs(np.random.default_rng(2).standard_normal((NEURONS, WIDTH)).astype(np.float32))
    b.sign_scores(Signs(packed, NEURONS, WIDTH), code, floats(TOKENS, NEURONS))


def attention(b: ProgramBuilder) -> None:
    q, k = floats(TOKENS, 64), floats(TOKENS, 32)
    slot = b.kv_slot(CAPACITY, 2, 16)
    b.rope(q, floats(CAPACITY, 8), floats(CAPACITY, 8), 4, 16, "neox")
    b.store_kv(k, floats(TOKENS, 32), slot)
    b.attention(q, slot, floats(TOKENS, 64), 4, 0.25, sinks=floats(4), slopes=floats(4))


def matrices(b: ProgramBuilder, pool: Pool) -> None:
    x, acts, out = floats(TOKENS, WIDTH), Activations(TOKENS, WIDTH), floats(TOKENS, NEURONS)
    up = rows(RowType.Q8_0, NEURONS, WIDTH)
    b.quantize(x, acts)
    b.matmul(Matrix.pack(pool, up, RowType.Q8_0, NEURONS, WIDTH), x, acts, out, bias=floats(NEURONS))
    part = (up, RowType.Q8_0)
    bundle = Bundle.pack(pool, NEURONS, WIDTH, gate=part, up=part, down=part)
    select, threshold = floats(TOKENS, NEURONS), floats(NEURONS)
    scratch = {"h": floats(TOKENS, NEURONS), "gate": floats(TOKENS, NEURONS), "bias": floats(NEURONS)}
    y = floats(TOKENS, WIDTH)
    b.sparse_ffn(select, x, acts, bundle, y, kind="relu", threshold=threshold, **scratch)
    b.sum_rows(out, Bundle.pack(pool, NEURONS, WIDTH, down=part), y)
    heads = [Matrix.pack(pool, rows(RowType.Q8_0, 16, 32), RowType.Q8_0, 16, 32) for _ in range(2)]
    b.head_matmul(heads, x, floats(TOKENS, 32))


def experts(b: ProgramBuilder, pool: Pool) -> None:
    def made(count: int, columns: int, layout: Layout = Layout.TILES) -> list[Matrix]:
        return [
            Matrix.pack(pool, rows(RowType.Q8_0, count, columns), RowType.Q8_0, count, columns, layout)
            for _ in range(4)
        ]

    choice = Choice.new(TOKENS, 4, 2)
    one = floats(TOKENS, 1), floats(TOKENS, 1)
    b.route(floats(TOKENS, 4), choice, bias=floats(4), shared=one)
    biases = floats(4, NEURONS), floats(4, NEURONS), floats(4, WIDTH)
    weights = ExpertWeights(made(NEURONS, WIDTH), made(NEURONS, WIDTH), made(WIDTH, NEURONS), *biases)
    buffers = ExpertBuffers.new(TOKENS * 2, WIDTH, NEURONS, gated=True)
    acts = Activations(TOKENS, WIDTH)
    b.experts(choice, floats(TOKENS, WIDTH), acts, weights, buffers, floats(TOKENS, WIDTH), "silu")
    up, down = made(NEURONS, WIDTH, Layout.PICKED_ROWS), made(WIDTH, NEURONS, Layout.PICKED_COLUMNS)
    picked = ExpertWeights(made(NEURONS, WIDTH), up, down, *biases)
    b.experts(choice, floats(TOKENS, WIDTH), acts, picked, buffers, floats(TOKENS, WIDTH), "relu")
    squares = aligned((4,), np.float64), aligned((4,), np.float64)
    b.count_experts(choice, aligned((2,), np.int64), aligned((4,), np.uint64), *squares)


def disk(b: ProgramBuilder, pool: Pool) -> Units:
    """Experts that are read from a file."""
    units, columns = Units(), 64
    for _ in range(8):
        units.add([Part(Matrix.absent(pool, RowType.F32, 16, columns), RowType.F32, 0, 0)])
    with tempfile.TemporaryFile() as file:
        file.write(bytes(16 * columns * 4))
        file.flush()
        units.open([UnitsFile(os.dup(file.fileno()), False)], [3], 1, 0.0)
    b.fetch(
        units, 0, Choice.new(TOKENS, 4, 2), [(4, Choice.new(TOKENS, 4, 2)), (2, Choice.new(TOKENS, 4, 2))]
    )
    return units


def neurons(b: ProgramBuilder, pool: Pool) -> Records:
    """Rows of neurons that are read from a file."""
    records, bundle = Records(), Bundle.absent(pool, NEURONS, WIDTH, (None, 0, 0))
    with tempfile.TemporaryFile() as file:
        layer = LayerOfRecords(bundle, 0, 0, 2 * WIDTH * 4, (None, 0, WIDTH * 4), 0)
        records.open([UnitsFile(os.dup(file.fileno()), False)], [layer], 100, 1 << 20)
    b.fetch_records(RecordsOf(records, 0), floats(TOKENS, NEURONS), floats(NEURONS), neurons=NEURONS)
    return records


def recurrent(b: ProgramBuilder) -> None:
    x, y = floats(TOKENS, WIDTH), floats(TOKENS, WIDTH)
    b.convolve(x, floats(4, WIDTH), floats(WIDTH), y, b.recurrent_slot(3 * WIDTH))
    inputs = (floats(TOKENS, 32), 0, 16)
    direct, step = floats(WIDTH), floats(TOKENS, WIDTH)
    b.scan_channels(x, step, floats(16, WIDTH), inputs, direct, y, b.recurrent_slot(16 * WIDTH))
    heads = floats(TOKENS, 4), floats(4)
    b.scan_heads(x, *heads, inputs, floats(4), y, b.recurrent_slot(16 * WIDTH), size=16)
    qk, rate = floats(TOKENS, 2 * 2 * 16), floats(TOKENS, 4)
    slot = b.recurrent_slot(4 * 16 * 16)
    b.general_delta(x, x, x, x, x, x, y, b.recurrent_slot(4 * 16 * 16), heads=4)
    b.delta_net(qk, x, floats(TOKENS, 4), rate, y, slot, key_heads=2, scale=0.25)


@pytest.fixture(scope="module")
def builder(pool: Pool) -> Iterator[ProgramBuilder]:
    made = ProgramBuilder(TOKENS)
    vectors(made)
    attention(made)
    matrices(made, pool)
    experts(made, pool)
    units, records = disk(made, pool), neurons(made, pool)
    recurrent(made)
    yield made
    units.close()
    records.close()


@pytest.fixture(scope="module")
def steps(builder: ProgramBuilder) -> dict[Op, Step]:
    """One right call of every operation, as the Python face hands it over."""
    return {step[0]: step for step in reversed(builder._operations)}


def append(
    step: Step, objects: tuple[Any, ...] | None = None, integers: tuple[int, ...] | None = None
) -> None:
    kind, right, numbers, values = step
    program = _kernels.Program(TOKENS, CAPACITY)
    program.append(int(kind), right if objects is None else objects, integers or numbers, values)


def refusal(step: Step, objects: tuple[Any, ...]) -> str | None:
    """The error that the extension raises, or None where it takes the operation."""
    try:
        append(step, objects)
    except KernelError as error:
        return str(error)
    return None


def replaced(items: tuple[Any, ...], k: int, item: Any) -> tuple[Any, ...]:
    return (*items[:k], item, *items[k + 1 :])


def wrong_arrays(array: Any) -> Iterator[tuple[str, Any]]:
    """Arrays that differ from the right one in one thing."""
    flat = array.reshape(-1)
    other = np.int16 if array.dtype.itemsize != 2 else np.float64
    yield "another type", np.zeros(array.shape, other)
    if array.dtype.itemsize > 1:
        yield "bytes of the right length", flat.view(np.uint8).copy()
        raw = np.zeros(array.nbytes + 1, np.uint8)
        yield "not aligned", raw[1:].view(array.dtype).reshape(array.shape)
    yield "too short", flat[:-1].copy()
    yield "not contiguous", np.zeros(2 * flat.size, array.dtype)[::2]
    yield "no buffer", [0.0] * flat.size


OPERATIONS = _kernels.operations()


def test_every_operation_has_a_right_call(builder: ProgramBuilder, steps: dict[Op, Step]) -> None:
    assert {op.name for op in steps} == set(OPERATIONS)
    for step in builder._operations:
        append(step)


@pytest.mark.parametrize("name", OPERATIONS)
def test_wrong_objects_are_errors(name: str, steps: dict[Op, Step], pool: Pool) -> None:
    step = steps[Op[name]]
    matrix = _kernels.Matrix(pool.handle, rows(RowType.F32, 16, 32), RowType.F32, 16, 32)
    others = (np.zeros(1 << 12, np.float32), None, (), (None,), 3)
    taken = []
    for k, right in enumerate(step[1]):
        if isinstance(right, np.ndarray):
            wrong = [*wrong_arrays(right), ("a matrix", matrix), ("a tuple", (matrix,))]
        else:
            wrong = [] if right is None else [(repr(other)[:20], other) for other in others]
        taken += [(k, what) for what, item in wrong if refusal(step, replaced(step[1], k, item)) is None]
    later = [(0, "too short"), (1, "too short")] if name == "ATTENTION" else []  # judged with its slot, below
    assert taken == later


@pytest.mark.parametrize("name", OPERATIONS)
def test_what_is_written_must_be_writable(name: str, steps: dict[Op, Step]) -> None:
    step = steps[Op[name]]
    messages = []
    for k, right in enumerate(step[1]):
        if isinstance(right, np.ndarray):
            frozen = right.copy()
            frozen.flags.writeable = False
            messages.append(refusal(step, replaced(step[1], k, frozen)))
    refused = [message for message in messages if message]
    assert all("cannot be written" in message for message in refused)
    assert refused or name in ("STORE_KV", "FETCH", "FETCH_RECORDS")  # these write elsewhere


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_size_that_is_said_wrong_is_an_error(name: str, steps: dict[Op, Step]) -> None:
    """Every integer, huge or negative where it has to be positive; no size is taken at its word."""
    step = steps[Op[name]]
    for k in range(len(step[2])):
        for wrong in (1 << 40, -(1 << 40)):
            with pytest.raises(KernelError, match=f"{name}: integer {k} is too large"):
                append(step, integers=replaced(step[2], k, wrong))


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_number_of_arguments_is_fixed(name: str, steps: dict[Op, Step]) -> None:
    step = steps[Op[name]]
    with pytest.raises(KernelError, match="wrong number of arguments"):
        append(step, step[1][:-1])
    with pytest.raises(KernelError, match="wrong number of arguments"):
        append(step, (*step[1], None))


def runs(builder: ProgramBuilder, step: Step, integers: tuple[int, ...], pool: Pool) -> bool:
    """Whether the extension takes the operation with these integers; if so, it is run."""
    kind, objects, _, values = step
    program = _kernels.Program(TOKENS, CAPACITY)
    try:
        program.append(int(kind), objects, integers, values)
        program.seal(tuple(slot.spec for slot in builder.slots))
    except KernelError:
        return False
    state = State.allocate(builder.slots, CAPACITY)
    program.run(pool.handle, 0, 1, ((state.handle, CAPACITY - TOKENS, TOKENS),))
    return True


@pytest.mark.parametrize("name", OPERATIONS)
def test_sizes_that_are_taken_can_be_run(
    name: str, builder: ProgramBuilder, steps: dict[Op, Step], pool: Pool
) -> None:
    """Every integer changed alone and two at a time: what is not refused stays within its buffers, which the
    sanitizers see."""
    step, rng = steps[Op[name]], np.random.default_rng(3)
    for array in step[1]:
        if isinstance(array, np.ndarray) and array.dtype == np.int32:
            array[...] = 0  # ids and choices that exist
    assert runs(builder, step, step[2], pool)
    for _ in range(150 if step[2] else 0):
        integers = list(step[2])
        for k in rng.integers(0, len(integers), rng.integers(1, 3)):
            old = integers[k]
            integers[k] = int(rng.choice([0, 1, -1, 2, old + 1, old - 1, 2 * old, old // 2, 32, 1 << 20]))
        runs(builder, step, tuple(integers), pool)


@pytest.mark.parametrize("buffer", ["q", "out"])
def test_attention_is_judged_when_its_slot_is_known(buffer: str) -> None:
    q, out = (floats(TOKENS, 48 if name == buffer else 64) for name in ("q", "out"))
    program = _kernels.Program(TOKENS, CAPACITY)
    program.append(int(Op.ATTENTION), (q, out, None, None), (0, 4, 0, 0), (0.25, 0.0))
    slot = ProgramBuilder(TOKENS).kv_slot(CAPACITY, 2, 16)
    with pytest.raises(KernelError, match="has no slot 0 of its kind"):
        program.seal((slot.spec,))


def test_copies_stay_within_their_columns() -> None:
    x, y = floats(TOKENS, WIDTH), floats(TOKENS, WIDTH)
    right = (WIDTH, WIDTH, 8, 16, 2, 8, 8, 8)
    step: Step = (Op.COPY, (x, y), right, ())
    append(step)
    for k, wrong in ((2, 60), (3, 60), (4, 100), (5, 60), (6, 60), (7, 60), (2, -1), (4, 0), (7, 0)):
        with pytest.raises(KernelError, match="COPY: its sizes or its parts do not go together"):
            append(step, integers=replaced(right, k, wrong))


def embedding(vocabulary: int = 10) -> tuple[ProgramBuilder, Any, Any]:
    """A builder that embeds, its ids, and what comes out."""
    builder, ids, out = ProgramBuilder(TOKENS), np.zeros(TOKENS, np.int32), floats(TOKENS, WIDTH)
    builder.embed(ids, rows(RowType.Q8_0, vocabulary, WIDTH), RowType.Q8_0, vocabulary, WIDTH, out)
    return builder, ids, out


def test_token_ids_that_change_during_a_run() -> None:
    """Another thread writes impossible ids all the time: each run embeds what it has checked, or refuses."""
    builder, ids, _ = embedding()
    for _ in range(300):  # so that a run lasts
        builder.rms_norm(floats(TOKENS, WIDTH), None, floats(TOKENS, WIDTH), 1e-5)
    builder.embed(ids, rows(RowType.Q8_0, 10, WIDTH), RowType.Q8_0, 10, WIDTH, floats(TOKENS, WIDTH))
    program, stop = builder.build(), threading.Event()

    def disturb() -> None:
        while not stop.is_set():
            ids[:] = 1 << 30
            ids[:] = 3

    other = threading.Thread(target=disturb)
    other.start()
    messages = set()
    try:
        with Pool(2) as pool:
            for _ in range(500):
                try:
                    program.run(pool, 0, program.operations, TOKENS)
                except KernelError as error:
                    messages.add(str(error).partition(" at ")[0])
    finally:
        stop.set()
        other.join()
    assert messages <= {f"token id {1 << 30}"}


@pytest.mark.parametrize("wrong", [4, -1, 1 << 30])
def test_a_choice_that_names_no_expert(wrong: int, pool: Pool) -> None:
    builder = ProgramBuilder(TOKENS)
    experts(builder, pool)
    program = builder.build()
    choice = next(step[1][0] for step in builder._operations if step[0] is Op.EXPERT_SUM)
    choice[:] = wrong
    with pytest.raises(KernelError, match="names an expert that does not exist"):
        program.run(pool, 1, program.operations, TOKENS)  # without the router
    program.run(pool, 0, program.operations, TOKENS)


def test_what_was_made_without_its_constructor(pool: Pool) -> None:
    _, acts = floats(TOKENS, WIDTH), Activations(TOKENS, WIDTH)
    for kind in (_kernels.Matrix, _kernels.Bundle, _kernels.State, _kernels.Program, _kernels.Pool):
        empty = kind.__new__(kind)
        with pytest.raises((KernelError, TypeError)):
            _kernels.Program(TOKENS, CAPACITY).append(
                int(Op.MATMUL),
                (empty, None, acts.q, acts.d, acts.s, None, floats(TOKENS, NEURONS)),
                (0, 0),
                (),
            )
    program = _kernels.Program.__new__(_kernels.Program)
    with pytest.raises(KernelError, match="not initialised"):
        program.append(int(Op.QUANTIZE), (), (), ())
    with pytest.raises(KernelError, match="not initialised"):
        program.seal(())
    with pytest.raises(KernelError, match="not complete"):
        program.run(pool.handle, 0, 0, ((None, 0, 1),))
    with pytest.raises(KernelError, match="closed"):
        _kernels.Matrix(_kernels.Pool.__new__(_kernels.Pool), bytes(4), RowType.F32, 1, 1)
    span = (_kernels.State.__new__(_kernels.State), 0, 1)
    complete = embedding()[0].build()
    with pytest.raises(KernelError, match="has not the slots"):
        complete._handle.run(pool.handle, 0, 1, (span,))


@pytest.mark.parametrize(
    ("nbytes", "row_type", "count", "columns"),
    [
        (34 * 3 - 1, RowType.Q8_0, 3, 32),
        (34 * 3, RowType.Q8_0, 4, 32),
        (34 * 3, RowType.Q8_0, 3, 33),
        (34 * 3, RowType.Q8_0, -3, 32),
        (34 * 3, RowType.Q8_0, 3, -32),
        (34 * 3, RowType.Q8_0, 1 << 62, 32),
        (34 * 3, RowType.Q8_0, 3, 1 << 62),
        (34 * 3, 64, 3, 32),
        (34 * 3, -1, 3, 32),
        (34 * 3, 1 << 30, 3, 32),
    ],
)
def test_weights_of_another_size(nbytes: int, row_type: int, count: int, columns: int, pool: Pool) -> None:
    """The extension's own functions and types, without the Python face's checks."""
    source, many = np.zeros(nbytes, np.uint8), np.zeros(4 * 33 * 4, np.float32)
    for call in (
        lambda: _kernels.Matrix(pool.handle, source, row_type, count, columns),
        lambda: _kernels.Bundle(pool.handle, (None, source, None), (0, row_type, 0), count, columns),
        lambda: _kernels.dequantize("scalar", source, many, row_type, count, columns),
        lambda: _kernels.quantize(many, source, row_type, count, columns),
        lambda: _kernels.repack(source, source[:-1], row_type),
    ):
        with pytest.raises(KernelError):
            call()


@pytest.mark.parametrize(
    "slot",
    [
        (0, CAPACITY, 0, 16, 16),
        (0, CAPACITY, 2, 15, 16),
        (0, CAPACITY, 2, 16, 2048),
        (0, 0, 2, 16, 16),
        (0, -1, 2, 16, 16),
        (0, 1 << 62, 2, 16, 16),
        (0, CAPACITY, 1 << 40, 16, 16),
        (1, 0),
        (1, -4),
        (1, 1 << 62),
        (2, 4),
        (-1, 4),
    ],
)
def test_slots_of_impossible_sizes(slot: tuple[int, ...]) -> None:
    with pytest.raises(KernelError):
        _kernels.Program(TOKENS, CAPACITY).seal((slot,))
    arrays = tuple(np.zeros(1 << 12, np.uint8) for _ in range(4 if slot[0] == 0 else 1))
    with pytest.raises(KernelError):
        _kernels.State(((slot[0], arrays, *slot[1:]),))


def test_a_cache_has_what_is_read_past_its_end() -> None:
    cache = KVCache(CAPACITY, 2, 16)
    sizes = (CAPACITY, 2, 16, 16)
    _kernels.State(((0, cache.buffers, *sizes),))
    with pytest.raises(KernelError, match="aligned bytes"):
        _kernels.State(((0, cache.arrays, *sizes),))


def test_a_program_that_ran_when_the_process_forked() -> None:
    """In the child neither the program nor its state nor its pool is in a run: that thread is not there."""
    builder = ProgramBuilder(1)
    x = floats(1, WIDTH)
    slot = builder.kv_slot(CAPACITY, 1, WIDTH)
    for _ in range(20_000):
        builder.rms_norm(x, None, x, 1e-5)
    builder.store_kv(x, x, slot)
    program, state, pool = builder.build(), State([KVCache(CAPACITY, 1, WIDTH)]), Pool(2)
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            program.run(pool, 0, program.operations, 1, 0, state)

    worker = threading.Thread(target=work)
    worker.start()
    statuses = []
    try:
        for _ in range(5):
            time.sleep(0.02)
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    program.run(pool, 0, program.operations, 1, 0, state)
                    pool.close()
                    code = 0
                finally:
                    os._exit(code)
            statuses.append(os.waitpid(child, 0)[1])
    finally:
        stop.set()
        worker.join()
    assert statuses == [0] * 5
