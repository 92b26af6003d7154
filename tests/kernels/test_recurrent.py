"""Recurrent blocks against the float64 reference; the same bits on every instruction set, for any number of
threads, any split of the tokens into runs, and any other sessions in a run."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from powerinfer_kernels import (
    KernelError,
    Pool,
    ProgramBuilder,
    RecurrentSlot,
    Span,
    State,
    aligned,
    available_isas,
)
from powerinfer_kernels import reference_recurrent as reference
from test_operations import EPS, filled, normal

TOKENS, SESSIONS = 9, 2
Inputs = dict[str, np.ndarray]
Write = Callable[[ProgramBuilder, Inputs, np.ndarray, RecurrentSlot], None]


class Block:
    """One operation over `SESSIONS` sessions of `TOKENS` tokens; `inputs` [sessions, tokens, width]."""

    def __init__(self, write: Write, inputs: Inputs, width: int, state: int) -> None:
        self.write, self.inputs, self.width, self.state = write, inputs, width, state

    def run(self, isa: str, threads: int, splits: list[list[int]]) -> np.ndarray:
        """Outputs [sessions, tokens, width]: in each run, each session's next `count` of `splits`."""
        most = max(sum(counts) for counts in splits)
        buffers = {name: aligned((most, a.shape[2]), np.float32) for name, a in self.inputs.items()}
        out, builder = aligned((most, self.width), np.float32), ProgramBuilder(most)
        slot = builder.recurrent_slot(self.state)
        self.write(builder, buffers, out, slot)
        program = builder.build()
        states = [State.allocate([slot], 1) for _ in range(SESSIONS)]
        result = np.zeros((SESSIONS, TOKENS, self.width), np.float32)
        position = [0] * SESSIONS
        with Pool(threads, isa) as pool:
            for counts in splits:
                row, spans = 0, []
                for session, count in enumerate(counts):
                    first = position[session]
                    for name, buffer in buffers.items():
                        buffer[row : row + count] = self.inputs[name][session, first : first + count]
                    if count:
                        spans.append(Span(states[session], 0, count))
                    row += count
                program.run_spans(pool, 0, builder.mark(), spans)
                row = 0
                for session, count in enumerate(counts):
                    at = position[session]
                    result[session, at : at + count] = out[row : row + count]
                    position[session] += count
                    row += count
        self.states = [state.recurrent[0].copy() for state in states]
        return result

    def outputs(self) -> tuple[np.ndarray, list[np.ndarray]]:
        """Outputs and last states, after all have been compared bit for bit."""
        base = self.run(available_isas()[0], 1, [[TOKENS, TOKENS]])
        states = self.states
        splits = [
            [[1, 1]] * TOKENS,
            [[TOKENS, 0], [0, TOKENS]],
            [[2, 0], [3, 4], [0, 5], [4, 0]],
        ]
        for isa in available_isas():
            for threads, split in zip((1, 3, 2), splits, strict=True):
                got = self.run(isa, threads, split)
                np.testing.assert_array_equal(got.view(np.uint32), base.view(np.uint32))
                for mine, other in zip(self.states, states, strict=True):
                    np.testing.assert_array_equal(mine.view(np.uint32), other.view(np.uint32))
        return base.astype(np.float64), [state.astype(np.float64) for state in states]


def uniform(rng: np.random.Generator, low: float, high: float, *shape: int) -> np.ndarray:
    return filled(rng.uniform(low, high, shape))


@pytest.mark.parametrize(("width", "length"), [(36, 2), (65, 3), (96, 4)])
@pytest.mark.parametrize("silu", [False, True])
def test_convolve(width: int, length: int, silu: bool) -> None:
    """`length` products and sums, and 8 ulp for silu, of the sum of sizes."""
    rng = np.random.default_rng(width)
    x, weight, bias = normal(rng, SESSIONS, TOKENS, width + 7), normal(rng, length, width), normal(rng, width)

    def write(b: ProgramBuilder, buffers: Inputs, out: np.ndarray, slot: RecurrentSlot) -> None:
        b.convolve(buffers["x"], weight, None if silu else bias, out, slot, src_first=5, silu=silu)

    got, states = Block(write, {"x": x}, width, (length - 1) * width).outputs()
    for session in range(SESSIONS):
        wide = x[session, :, 5 : 5 + width].astype(np.float64)
        zero = np.zeros((length - 1, width))
        used = None if silu else bias.astype(np.float64)
        want, state = reference.convolve(wide, weight.astype(np.float64), used, zero)
        sizes, _ = reference.convolve(np.abs(wide), np.abs(weight).astype(np.float64), np.abs(bias), zero)
        if silu:
            want = want / (1 + np.exp(-want))
        assert (np.abs(got[session] - want) <= (length + 16) * EPS * sizes).all()
        np.testing.assert_array_equal(states[session].reshape(length - 1, width), state)


@pytest.mark.parametrize(("width", "size"), [(36, 5), (64, 16)])
def test_scan_channels(width: int, size: int) -> None:
    """Each token multiplies by an exponential (2 ulp) and adds one product; size products are summed. Errors
    of tokens before shrink with the state, so TOKENS times those of one token bound all."""
    rng = np.random.default_rng(width)
    inputs = {
        "x": normal(rng, SESSIONS, TOKENS, width),
        "step": uniform(rng, 0.01, 1.0, SESSIONS, TOKENS, width),
        "both": normal(rng, SESSIONS, TOKENS, 3 + 2 * size),
    }
    decay, direct = uniform(rng, -4, -0.1, size, width), normal(rng, width)

    def write(b: ProgramBuilder, buffers: Inputs, out: np.ndarray, slot: RecurrentSlot) -> None:
        x, step, both = (buffers[name] for name in ("x", "step", "both"))
        b.scan_channels(x, step, decay, (both, 3, 3 + size), direct, out, slot)

    got, states = Block(write, inputs, width, size * width).outputs()
    for session in range(SESSIONS):
        x, step, both = (inputs[name][session].astype(np.float64) for name in ("x", "step", "both"))
        b, c = both[:, 3 : 3 + size], both[:, 3 + size :]
        want, state = reference.scan_channels(
            x, step, decay.astype(np.float64), b, c, direct.astype(np.float64), np.zeros((size, width))
        )
        scale = size * np.abs(x).max() * np.abs(b).max() * np.abs(c).max() + np.abs(direct * x).max()
        assert np.abs(got[session] - want).max() <= TOKENS * 16 * EPS * scale
        assert np.abs(states[session].reshape(size, width) - state).max() <= TOKENS * 16 * EPS * scale


@pytest.mark.parametrize(("heads", "dim", "size", "groups"), [(1, 36, 4, 1), (6, 20, 16, 2), (4, 64, 24, 4)])
def test_scan_heads(heads: int, dim: int, size: int, groups: int) -> None:
    """As for channels; x, B and C in one array, as a convolution leaves them."""
    rng = np.random.default_rng(heads)
    width, vectors = heads * dim, groups * size
    inputs = {
        "mixed": normal(rng, SESSIONS, TOKENS, width + 2 * vectors),
        "step": uniform(rng, 0.01, 1.0, SESSIONS, TOKENS, heads),
    }
    decay, direct = uniform(rng, -4, -0.1, heads), normal(rng, heads)

    def write(b: ProgramBuilder, buffers: Inputs, out: np.ndarray, slot: RecurrentSlot) -> None:
        mixed = buffers["mixed"]
        places = (mixed, width, width + vectors)
        b.scan_heads(mixed, buffers["step"], decay, places, direct, out, slot, size=size, groups=groups)

    got, states = Block(write, inputs, width, size * width).outputs()
    for session in range(SESSIONS):
        mixed, step = (inputs[name][session].astype(np.float64) for name in ("mixed", "step"))
        x = mixed[:, :width].reshape(TOKENS, heads, dim)
        b, c = mixed[:, width:].reshape(TOKENS, 2, groups, size).transpose(1, 0, 2, 3)
        factors = [a.astype(np.float64) for a in (decay, direct)]
        zero = np.zeros((heads, size, dim))
        want, state = reference.scan_heads(x, step, factors[0], b, c, factors[1], zero)
        scale = (size * np.abs(b).max() * np.abs(c).max() + np.abs(direct).max()) * np.abs(x).max()
        assert np.abs(got[session] - want.reshape(TOKENS, -1)).max() <= TOKENS * 16 * EPS * scale
        assert np.abs(states[session].reshape(state.shape) - state).max() <= TOKENS * 16 * EPS * scale


@pytest.mark.parametrize(
    ("heads", "key_heads", "size", "dim", "interleaved", "decays"),
    [
        (1, 1, 5, 36, True, 1),
        (4, 2, 16, 24, True, 1),
        (6, 2, 32, 33, False, 1),
        (3, 3, 20, 18, True, 20),
        (4, 2, 16, 40, False, 16),
    ],
)
def test_delta_net(heads: int, key_heads: int, size: int, dim: int, interleaved: bool, decays: int) -> None:
    """Keys of length one keep the state's growth in bounds: a token's errors are some ulp of sums of `size`
    products, and 30 · TOKENS of them hold all."""
    rng = np.random.default_rng(heads)
    qk = rng.standard_normal((SESSIONS, TOKENS, 2 * key_heads, size))
    qk /= np.linalg.norm(qk, axis=-1, keepdims=True)
    inputs = {
        "qk": filled(qk.reshape(SESSIONS, TOKENS, -1)),
        "v": normal(rng, SESSIONS, TOKENS, 3 + heads * dim),
        "decay": uniform(rng, -2, -0.01, SESSIONS, TOKENS, heads * decays),
        "rate": uniform(rng, 0, 1, SESSIONS, TOKENS, heads),
    }

    def write(b: ProgramBuilder, buffers: Inputs, out: np.ndarray, slot: RecurrentSlot) -> None:
        options: dict[str, Any] = {"key_heads": key_heads, "v_first": 3, "interleaved": interleaved}
        b.delta_net(*buffers.values(), out, slot, scale=0.25, **options)

    got, states = Block(write, inputs, heads * dim, heads * size * dim).outputs()
    of_head = [h // (heads // key_heads) if interleaved else h % key_heads for h in range(heads)]
    for session in range(SESSIONS):
        both, v, decay, rate = (a[session].astype(np.float64) for a in inputs.values())
        q, k = both.reshape(TOKENS, 2, key_heads, size).transpose(1, 0, 2, 3)[:, :, of_head]
        zero = np.zeros((heads, size, dim))
        values, decay = v[:, 3:].reshape(TOKENS, heads, dim), decay.reshape(TOKENS, heads, -1)
        want, state = reference.delta_net(q, k, values, decay, rate, 0.25, zero)
        scale = np.abs(v).max() * size
        assert np.abs(got[session] - want.reshape(TOKENS, -1)).max() <= TOKENS * 30 * EPS * scale
        assert np.abs(states[session].reshape(state.shape) - state).max() <= TOKENS * 30 * EPS * scale


@pytest.mark.parametrize(("heads", "size", "dim"), [(1, 5, 36), (3, 16, 16), (2, 33, 20)])
def test_general_delta(heads: int, size: int, dim: int) -> None:
    """As for delta nets: what is removed is at most what the state holds."""
    rng = np.random.default_rng(heads)
    unit = rng.standard_normal((SESSIONS, TOKENS, heads, size))
    unit /= np.linalg.norm(unit, axis=-1, keepdims=True)
    inputs = {
        "q": normal(rng, SESSIONS, TOKENS, heads * size),
        "k": normal(rng, SESSIONS, TOKENS, heads * size),
        "v": normal(rng, SESSIONS, TOKENS, heads * dim),
        "decay": uniform(rng, -0.6, -0.01, SESSIONS, TOKENS, heads * size),
        "unit": filled(unit.reshape(SESSIONS, TOKENS, -1)),
        "rate": uniform(rng, 0, 1, SESSIONS, TOKENS, heads * size),
    }

    def write(b: ProgramBuilder, buffers: Inputs, out: np.ndarray, slot: RecurrentSlot) -> None:
        b.general_delta(*buffers.values(), out, slot, heads=heads)

    got, states = Block(write, inputs, heads * dim, heads * size * dim).outputs()
    for session in range(SESSIONS):
        arrays = [a[session].astype(np.float64).reshape(TOKENS, heads, -1) for a in inputs.values()]
        want, state = reference.general_delta(*arrays, np.zeros((heads, size, dim)))
        scale = np.abs(arrays[0]).max() * np.abs(arrays[1]).max() * np.abs(arrays[2]).max() * size * TOKENS
        assert np.abs(got[session] - want.reshape(TOKENS, -1)).max() <= TOKENS * 30 * EPS * scale
        assert np.abs(states[session].reshape(state.shape) - state).max() <= TOKENS * 30 * EPS * scale


def test_what_does_not_fit_is_refused() -> None:
    builder, x, out = ProgramBuilder(2), aligned((2, 40), np.float32), aligned((2, 32), np.float32)
    slot = builder.recurrent_slot(96)
    with pytest.raises(KernelError, match="the state needs 64 values, the slot has 96"):
        builder.convolve(x, aligned((3, 32), np.float32), None, out, slot)
    with pytest.raises(KernelError, match="are not within src's 40"):
        builder.convolve(x, aligned((4, 32), np.float32), None, out, slot, src_first=9)
    with pytest.raises(KernelError, match="of length 2 or more"):
        builder.convolve(x, aligned((1, 32), np.float32), None, out, slot)
    step, decay = aligned((2, 3), np.float32), aligned((3,), np.float32)
    with pytest.raises(KernelError, match="3 heads in 1 groups do not divide a width of 32"):
        builder.scan_heads(x, step, decay, (x, 0, 8), decay, out, slot, size=4)
    two = aligned((2, 2), np.float32)
    with pytest.raises(KernelError, match="2 heads of 1 key heads do not divide widths of 32 and 33"):
        builder.delta_net(aligned((2, 33), np.float32), x, two, two, out, slot, key_heads=1, scale=1.0)
