"""The kernels of the hot side alone: compared with float64, timed beside a plain read of device memory."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from gpu_run import Row, Run

from powerinfer_kernels import RowType, dequantize, packed_row_bytes, reference, repack
from powerinfer_kernels.triton_layout import to_planar
from powerinfer_tools.engine.hot.cache import Attending, HeldVectors, HotCache
from powerinfer_tools.engine.hot.elementwise import round_activations
from powerinfer_tools.engine.hot.hot_ffn import FileRows, FusedRows, HotFFN, Inputs, Rows, Scratch
from powerinfer_tools.engine.hot.mapped import through
from powerinfer_tools.measure.synthetic.random_blocks import random_rows
from powerinfer_tools.model.device_memory import CHUNK_ROWS

EPS = float(np.finfo(np.float32).eps)
#: Different rows of a matrix; more would only take longer to make and to check.
PATTERN_ROWS = 61
#: One row type of each kind that kernels decode in a way of their own, and all that many models have.
ROW_TYPES = (
    RowType.F16, RowType.Q8_0, RowType.Q4_0, RowType.Q4_1, RowType.Q5_0, RowType.Q4_K, RowType.Q5_K,
    RowType.Q6_K, RowType.Q2_K, RowType.Q3_K, RowType.IQ4_XS, RowType.MXFP4,
)  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """Bytes of a matrix, larger than any cache of a GPU; columns of its rows; positions of attention."""

    nbytes: int = 256 << 20
    width: int = 4096
    context: int = 4096


def measure_read(run: Run, nbytes: int) -> float:
    """Bytes per second read by a sum over as many, which is what memory allows."""
    values = torch.ones(nbytes // 4, device=run.where)
    total = torch.empty((), device=run.where)
    speed = nbytes / run.timed(lambda: torch.sum(values, dim=0, out=total))
    run.add(Row(f"a read of {nbytes >> 20} MiB in the device's memory", speed / 1e9, "GB/s", 1.0))
    return speed


def measure_exchange(run: Run, width: int) -> None:
    """What a split layer pays for handing over: a row to the host and one back, waited for; by copies, and by
    kernels that reach the host's memory."""
    here, there = run.device.staging(1, width), torch.zeros(1, width, device=run.where)

    def both() -> None:
        here.copy_(there, non_blocking=True)
        there.copy_(here, non_blocking=True)

    run.add(Row(f"a row of {width} out and in, waited for", run.waited(both) * 1e6, "µs"))
    window = run.device.window(here)
    if window is not None:

        def by_kernels() -> None:
            through(there, window)
            through(window, there)

        run.add(Row(f"a row of {width} out and in, by kernels", run.waited(by_kernels) * 1e6, "µs"))
    run.add(Row("a wait for nothing", run.waited(lambda: None) * 1e6, "µs"))


def measure_row_types(run: Run, sizes: Sizes, limit: float, *, fused: bool) -> None:
    """Row types by fused kernels, or by plain torch operations."""
    for row_type in ROW_TYPES:
        what = f"{row_type.name} rows, {'fused' if fused else 'plain'}"
        run.attempt(what, 15, lambda t=row_type: measure_rows(run, t, sizes, limit, fused=fused))  # type: ignore[misc]


def measure_rows(run: Run, row_type: RowType, sizes: Sizes, limit: float, *, fused: bool) -> None:
    """One matrix serves as gate, up and down: what matters is how many bytes are read. The check is of a ReLU
    FFN over all its rows, which are PATTERN_ROWS different ones again and again."""
    width, rng = sizes.width, np.random.default_rng(int(row_type))
    neurons = max(PATTERN_ROWS, sizes.nbytes // packed_row_bytes(row_type, width))
    pattern = random_rows(rng, row_type.name, PATTERN_ROWS, width).view(np.uint8).reshape(PATTERN_ROWS, -1)
    rows = rows_on(run, np.resize(pattern, (neurons, pattern.shape[1])), row_type, width, fused=fused)
    x = rng.standard_normal((1, width), dtype=np.float32)
    if not row_type.is_float:
        x = rounded(x)
    exact = dequantize(pattern, row_type, PATTERN_ROWS, width).astype(np.float64)
    error, active = check_rows(run, rows, neurons, x, exact)
    inputs, scratch, out = space_for(run, neurons, x, codes=fused and not row_type.is_float)
    name, nbytes = (
        f"{row_type.name} {'fused' if fused else 'plain'}",
        neurons * packed_row_bytes(row_type, width),
    )
    for activation, read in (("silu", 3.0), ("relu", 1 + 2 * active if fused else 3.0)):
        ffn = HotFFN(rows, rows, rows, None, neurons, (activation, 0.0))
        rate = read * nbytes / run.timed(lambda ffn=ffn: ffn.compute(inputs, scratch, out))  # type: ignore[misc]
        wrong = error if activation == "relu" else None
        run.add(Row(f"{name}: FFN with {activation}", rate / 1e9, "GB/s", rate / limit, error=wrong))


def rounded(x: np.ndarray) -> np.ndarray:
    """x as the integer kernels round it; rounded again it stays the same."""
    out = torch.empty(x.shape)
    round_activations(torch.from_numpy(x), out)
    found: np.ndarray = out.numpy()
    return found


def rows_on(run: Run, raw: np.ndarray, row_type: RowType, width: int, *, fused: bool) -> Rows:
    """The rows ``raw`` on the device."""
    packed = repack(raw, row_type, len(raw), width)
    if not fused:
        return FileRows(row_type, torch.from_numpy(packed).to(run.where))
    from powerinfer_kernels.triton_launch import PlanarRows

    data = torch.from_numpy(to_planar(packed, row_type, width)).to(run.where)
    return FusedRows(PlanarRows(data, row_type, len(raw), width))


def space_for(run: Run, neurons: int, x: np.ndarray, *, codes: bool) -> tuple[Inputs, Scratch, torch.Tensor]:
    """The input ``x`` (1, width) there, as ``codes`` too, scratch, and a place for the sum."""
    from powerinfer_tools.engine.hot.assembly import rest_floats

    width, chunk = x.shape[1], min(CHUNK_ROWS, neurons)

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device=run.where)

    there = torch.from_numpy(x).to(run.where)
    scratch = Scratch(empty(chunk, width), empty(chunk), empty(chunk), empty(rest_floats(neurons, width)))
    inputs = Inputs(there, there)
    if codes:
        from powerinfer_kernels.triton_launch import code_words

        words = torch.empty(1, code_words(width), dtype=torch.int32, device=run.where)
        inputs = Inputs(there, torch.empty_like(there), words)
        inputs.round()
    return inputs, scratch, empty(1, width)


def check_rows(run: Run, rows: Rows, neurons: int, x: np.ndarray, exact: np.ndarray) -> tuple[float, float]:
    """The largest error of a ReLU FFN over what rounding explains, and the share of active neurons. Sums of
    ``width`` terms make the hidden values, of ``neurons`` terms the output."""
    codes = isinstance(rows, FusedRows) and not rows.row_type.is_float
    inputs, scratch, out = space_for(run, neurons, x, codes=codes)
    ffn = HotFFN(rows, rows, rows, None, neurons, ("relu", 0.0))
    run.settled()
    run.device.submit((("work", lambda: ffn.compute(inputs, scratch, out)),)).wait()
    got = out.cpu().numpy()[0]
    counts = np.bincount(np.arange(neurons) % PATTERN_ROWS, minlength=PATTERN_ROWS)
    products = exact @ x[0].astype(np.float64)
    hidden = np.maximum(products, 0) * products
    slack = (x.shape[1] + 4) * EPS * (np.abs(exact) @ np.abs(x[0]).astype(np.float64))
    hidden_error = 2 * slack * np.abs(products) + slack**2
    expected = (counts * hidden) @ exact
    allowed = (counts * (hidden_error + (neurons + 4) * EPS * hidden)) @ np.abs(exact)
    return float((np.abs(got - expected) / allowed).max()), float((products > 0) @ counts / neurons)


def measure_attention(run: Run, sizes: Sizes, limit: float, *, fused: bool) -> None:
    """One token over a cache of half precision, and of bytes: 32 heads of 128 values, 8 of keys."""
    for kind in ("f16", "q8_0"):
        what = f"attention over {sizes.context} positions, {kind}, {'fused' if fused else 'plain'}"
        run.attempt(what, 15, lambda k=kind, w=what: _attention(run, w, k, sizes.context, limit, fused=fused))  # type: ignore[misc]


def _attention(run: Run, name: str, kind: str, context: int, limit: float, *, fused: bool) -> None:
    heads, kv_heads, dim, scale = 32, 8, 128, 128**-0.5
    rng = np.random.default_rng(1)
    (keys, k), (values, v) = (_held(rng, kind, (kv_heads, context, dim)) for _ in range(2))
    query = rng.standard_normal((1, heads * dim), dtype=np.float32)
    by_position = [x.transpose(1, 0, 2).astype(np.float64) for x in (k, v)]
    rows = query.reshape(1, heads, dim).astype(np.float64)
    expected = reference.attention(rows, by_position[0], by_position[1], scale, context - 1)
    cache = HotCache(*(_moved(held, run.where) for held in (keys, values)))
    there, out = torch.from_numpy(query).to(run.where), torch.empty(1, heads * dim, device=run.where)
    work = (_fused_attention if fused else _plain_attention)(run, there, cache, scale, out)
    seconds = run.timed(work, times=4)
    error = np.abs(out.cpu().numpy().reshape(expected.shape) - expected).max()
    # A score is a sum of ``dim`` products; its error moves the weights.
    score = scale * float(np.abs(query).max() * np.abs(k).max()) * dim
    allowed = (context + 4 * dim * score) * EPS * np.abs(v).max()
    rate = (
        sum(x.nbytes for held in (keys, values) for x in (held.data, held.scales) if x is not None) / seconds
    )
    run.add(Row(name, rate / 1e9, "GB/s", rate / limit, error=float(error / allowed)))


def _fused_attention(
    run: Run, query: torch.Tensor, cache: HotCache, scale: float, out: torch.Tensor
) -> Callable[[], object]:
    from powerinfer_kernels import triton_launch

    _, context, dim = cache.keys.data.shape
    position = torch.tensor([context - 1], device=run.where)
    floats = triton_launch.partial_floats(query.shape[1] // dim, dim, context)
    partial = torch.empty(floats, device=run.where)
    # The token's own key and value are kept anew, as the bits that are there.
    key, value = (
        held.between(context - 1, context).reshape(1, -1).contiguous() for held in (cache.keys, cache.values)
    )
    return lambda: triton_launch.attend(
        query, key, value, cache.keys, cache.values, position, partial, out,
        scale=scale, window=0, softcap=0.0,
    )  # fmt: skip


def _plain_attention(
    run: Run, query: torch.Tensor, cache: HotCache, scale: float, out: torch.Tensor
) -> Callable[[], object]:
    _, context, dim = cache.keys.data.shape
    heads = query.shape[1] // dim
    looks, space = Attending(heads, scale, 0, 0.0), torch.empty(heads * context, device=run.where)
    return lambda: looks.attend(query, cache, context - 1, space, out)


def _held(rng: np.random.Generator, kind: str, shape: tuple[int, ...]) -> tuple[HeldVectors, np.ndarray]:
    """Random keys or values as a cache holds them, and as float32."""
    if kind == "f16":
        data = rng.standard_normal(shape, dtype=np.float32).astype(np.float16)
        return HeldVectors(torch.from_numpy(data), None), data.astype(np.float32)
    codes = rng.integers(-127, 128, shape, dtype=np.int8)
    codes[..., ::32] = 127  # as in any block that was rounded
    steps = rng.uniform(0.005, 0.02, (*shape[:2], shape[2] // 32)).astype(np.float16)
    wide = (codes.reshape(*steps.shape, 32) * steps[..., None].astype(np.float32)).reshape(shape)
    return HeldVectors(torch.from_numpy(codes), torch.from_numpy(steps)), wide


def _moved(held: HeldVectors, where: torch.device) -> HeldVectors:
    return HeldVectors(held.data.to(where), None if held.scales is None else held.scales.to(where))
