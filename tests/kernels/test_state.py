"""Several sessions in one run: every token gets the bits that it would get alone."""

import threading
from typing import Any

import numpy as np
import pytest

from powerinfer_kernels import (
    KernelError,
    KVCache,
    KVSlot,
    Pool,
    Program,
    ProgramBuilder,
    Span,
    State,
    aligned,
    available_isas,
)

HEADS, KV_HEADS, DIM, LONGEST = 6, 2, 32, 48
MAX_TOKENS = 24


class Attending:
    """rope, store_kv and attention over sessions of any length."""

    def __init__(self, **options: Any) -> None:
        rng = np.random.default_rng(5)
        self.q, self.k, self.v = (
            aligned((MAX_TOKENS, n * DIM), np.float32) for n in (HEADS, KV_HEADS, KV_HEADS)
        )
        self.out = aligned((MAX_TOKENS, HEADS * DIM), np.float32)
        angles = rng.standard_normal((LONGEST, DIM // 2))
        cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        builder = ProgramBuilder(MAX_TOKENS)
        self.slot = builder.kv_slot(LONGEST, KV_HEADS, DIM)
        builder.rope(self.q, cos, sin, HEADS, DIM, "neox")
        builder.rope(self.k, cos, sin, KV_HEADS, DIM, "neox")
        builder.store_kv(self.k, self.v, self.slot)
        builder.attention(self.q, self.slot, self.out, HEADS, 0.3, **options)
        self.program: Program = builder.build()

    def run(self, pool: Pool, parts: list[tuple["Talk", int]]) -> None:
        """One run of the next tokens of each."""
        row, spans = 0, []
        for talk, count in parts:
            for buffer, values in zip((self.q, self.k, self.v), talk.inputs, strict=True):
                buffer[row : row + count] = values[talk.position : talk.position + count]
            spans.append(Span(talk.state, talk.position, count))
            row += count
        self.program.run_spans(pool, 0, self.program.operations, spans)
        row = 0
        for talk, count in parts:
            talk.outs.append(self.out[row : row + count].copy())
            talk.position += count
            row += count


class Talk:
    """One session: its inputs, its state and what it got so far."""

    def __init__(self, seed: int, length: int, capacity: int, kind: str) -> None:
        rng = np.random.default_rng(seed)
        self.length, self.position = length, 0
        self.inputs = [
            rng.standard_normal((length, n * DIM)).astype(np.float32) for n in (HEADS, KV_HEADS, KV_HEADS)
        ]
        self.state = State([KVCache(capacity, KV_HEADS, DIM, kind)])
        self.outs: list[np.ndarray] = []

    def bits(self) -> np.ndarray:
        return np.concatenate(self.outs).view(np.uint32)


def talks() -> list[Talk]:
    """Sessions that differ in length, room and type of cache."""
    kinds = ("f16", "q8_0", "f16", "f16", "q8_0")
    lengths = (31, 17, 1, 40, 9)
    return [
        Talk(seed, length, min(LONGEST, length + 3 * seed), kind)
        for seed, (length, kind) in enumerate(zip(lengths, kinds, strict=True))
    ]


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("options", [{}, {"window": 7, "softcap": 2.0}], ids=["all", "window"])
def test_company_changes_no_bit(isa: str, options: dict[str, Any]) -> None:
    attending, alone = Attending(**options), talks()
    with Pool(1, isa) as pool:
        for talk in alone:
            while talk.position < talk.length:
                attending.run(pool, [(talk, 1)])
    rng = np.random.default_rng(11)
    for threads in (1, 2, 3):
        together = talks()
        with Pool(threads, isa) as pool:
            while left := [talk for talk in together if talk.position < talk.length]:
                order = rng.permutation(len(left))[: rng.integers(1, len(left) + 1)]
                room, parts = MAX_TOKENS, []
                for index in order.tolist():
                    most = min(room - len(order) + len(parts) + 1, left[index].length - left[index].position)
                    count = int(rng.integers(1, most + 1))
                    parts.append((left[index], count))
                    room -= count
                attending.run(pool, parts)
        for one, other in zip(alone, together, strict=True):
            np.testing.assert_array_equal(one.bits(), other.bits())


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
@pytest.mark.parametrize("positions", [1, 16, 21])
def test_a_copied_prefix_goes_on_with_the_same_bits(kind: str, positions: int) -> None:
    attending, first, second = Attending(), Talk(3, 30, 31, kind), Talk(3, 30, 47, kind)
    with Pool(2) as pool:
        attending.run(pool, [(first, positions)])
        second.state.copy_positions(first.state, positions)
        second.position = positions
        for talk in (first, second):
            attending.run(pool, [(talk, 30 - positions if positions > 6 else 24)])
    np.testing.assert_array_equal(first.outs[-1].view(np.uint32), second.outs[-1].view(np.uint32))


def test_copies_that_do_not_fit() -> None:
    cache = KVCache(8, 2, 4)
    for other in (KVCache(8, 2, 6), KVCache(8, 1, 4), KVCache(4, 2, 4)):
        with pytest.raises(KernelError, match="do not go into"):
            cache.copy_positions(other, 5)
    with pytest.raises(KernelError, match="different slots"):
        State([cache]).copy_positions(State([cache, cache]), 1)
    with pytest.raises(KernelError, match="different slots"):
        State([cache]).copy_positions(State([aligned((4,), np.float32)]), 1)


def test_recurrent_slots_are_zero_and_copied() -> None:
    builder = ProgramBuilder(1)
    slots = [builder.kv_slot(8, 1, 4), builder.recurrent_slot(5)]
    one, other = State.allocate(slots, 8), State.allocate(slots, 6)
    assert not one.recurrent[0].any()
    one.recurrent[0][:] = np.arange(5)
    other.copy_positions(one, 3)
    np.testing.assert_array_equal(other.recurrent[0], np.arange(5))
    assert one.nbytes == one.caches[0].nbytes + 20
    with pytest.raises(KernelError, match="cannot hold 9"):
        State.allocate(slots, 9)


def storing() -> tuple[Program, KVSlot]:
    builder, one = ProgramBuilder(4), aligned((4, 8), np.float32)
    slot = builder.kv_slot(6, 2, 4)
    builder.store_kv(one, one, slot)
    return builder.build(), slot


def test_spans_that_are_refused_change_nothing() -> None:
    program, slot = storing()
    good = State.allocate([slot], 5)
    narrow, long = State([KVCache(6, 1, 8)]), State([KVCache(7, 2, 4)])
    two, none = State([KVCache(6, 2, 4), KVCache(6, 2, 4)]), State([])
    vector = State([aligned((48,), np.float32)])
    with Pool(1) as pool:
        for state in (narrow, long, two, none, vector):
            with pytest.raises(KernelError, match="has not the slots"):
                program.run_spans(pool, 0, 1, [Span(good, 0, 1), Span(state, 0, 1)])
        with pytest.raises(KernelError, match="needs a state"):
            program.run_spans(pool, 0, 1, [Span(good, 0, 1), Span(None, 0, 1)])
        with pytest.raises(KernelError, match="in a run already"):
            program.run_spans(pool, 0, 1, [Span(good, 0, 1), Span(good, 1, 1)])
        with pytest.raises(KernelError, match="do not fit a cache of 5"):
            program.run_spans(pool, 0, 1, [Span(good, 4, 2)])
        with pytest.raises(KernelError, match="do not fit a context of 6"):
            program.run_spans(pool, 0, 1, [Span(good, 5, 2)])
        with pytest.raises(KernelError, match="n_tokens must be between 1 and 2"):
            program.run_spans(pool, 0, 1, [Span(good, 0, 2), Span(State.allocate([slot], 6), 0, 3)])
        with pytest.raises(KernelError, match="takes 1 to 4 spans"):
            program.run_spans(pool, 0, 1, [])
        assert not any(array.any() for array in good.caches[0].arrays if array is not None)
        program.run_spans(pool, 0, 1, [Span(good, 4, 1)])  # it was let go of every time


def test_two_programs_in_two_threads_do_not_share_a_state() -> None:
    """One of them is refused, or comes after the other: never both at once."""
    programs = [storing()[0] for _ in range(2)]
    state, refused = State([KVCache(6, 2, 4)]), []

    def work(program: Program) -> None:
        with Pool(1) as pool:
            for _ in range(200):
                try:
                    program.run(pool, 0, 1, 4, 0, state)
                except KernelError as error:
                    refused.append(str(error))

    threads = [threading.Thread(target=work, args=(program,)) for program in programs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(refused) <= {"the state is in a run already"}


def test_operations_name_slots_that_exist() -> None:
    builder, one = ProgramBuilder(1), aligned((1, 8), np.float32)
    builder.store_kv(one, one, KVSlot(1, 6, 2, 4, 4))
    builder.kv_slot(6, 2, 4)
    with pytest.raises(KernelError, match="no slot 1"):
        builder.build()
    builder = ProgramBuilder(1)
    slot = builder.recurrent_slot(8)
    builder.store_kv(one, one, KVSlot(slot.index, 6, 2, 4, 4))
    with pytest.raises(KernelError, match="no slot 0"):
        builder.build()
