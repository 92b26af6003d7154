"""What attention and the head on a device are made of, beside the C kernels and the float64 reference."""

import numpy as np
import pytest
import torch

from powerinfer_kernels import Activations, Pool, ProgramBuilder, RowType, reference
from powerinfer_tools.engine.hot import cache as hot_cache
from powerinfer_tools.engine.hot.cache import Attending, HeldVectors, HotCache
from powerinfer_tools.engine.hot.elementwise import HotNorm, rotate, round_activations
from powerinfer_tools.engine.hot.hot_ffn import FileRows, Inputs, UnpackedRows
from powerinfer_tools.engine.hot.loading import Arena, Form
from powerinfer_tools.engine.hot.products import Product

EPS = np.finfo(np.float32).eps
RANDOM = np.random.default_rng(7)


def rounded_by_kernels(x: np.ndarray) -> np.ndarray:
    """Codes times scales, as the integer kernels take them."""
    tokens, columns = x.shape
    acts, source = Activations(tokens, columns), np.ascontiguousarray(x)
    builder = ProgramBuilder(tokens)
    builder.quantize(source, acts)
    with Pool(1) as pool:
        builder.build().run(pool, 0, builder.mark(), tokens, 0)
    return (acts.q.reshape(tokens, -1, 32) * acts.d[:, :, None]).reshape(x.shape)


def test_activations_are_rounded_to_the_bits_of_the_kernels() -> None:
    """Ties, zeros, scales too small to invert, and values that are not finite as well."""
    x = RANDOM.standard_normal((40, 96)).astype(np.float32) * 10.0 ** RANDOM.integers(-30, 30, (40, 1))
    x[0, :32] = np.arange(-16, 16) + 0.5
    x[1], x[2, 40:70], x[3, 5], x[4, 90] = 0, 1e-39, np.inf, np.nan
    x = x.astype(np.float32)
    out = torch.empty(40, 96)
    round_activations(torch.from_numpy(x), out)
    assert np.array_equal(out.numpy(), rounded_by_kernels(x), equal_nan=True)
    assert np.isnan(out.numpy()[3, :32]).all()
    assert np.isnan(out.numpy()[4, 64:]).all()


@pytest.mark.parametrize(("kind", "groups"), [("rms", 1), ("rms", 4), ("layer", 1)])
def test_norms(kind: str, groups: int) -> None:
    x = RANDOM.standard_normal((3, 48)).astype(np.float32)
    weight = RANDOM.standard_normal(48 // groups).astype(np.float32)
    bias = RANDOM.standard_normal(48).astype(np.float32) if kind == "layer" else None
    tensor = torch.from_numpy(x.copy())
    HotNorm(kind, torch.from_numpy(weight), None if bias is None else torch.from_numpy(bias), 1e-5).apply(
        tensor, tensor, groups
    )
    wide = x.astype(np.float64)
    if bias is None:
        expected = reference.rms_norm(wide, weight.astype(np.float64), 1e-5, groups)
    else:
        expected = reference.layer_norm(wide, weight.astype(np.float64), bias.astype(np.float64), 1e-5)
    # Sums of 48 squares, a root, and three products.
    assert np.abs(tensor.numpy() - expected).max() <= 60 * EPS * np.abs(expected).max()


@pytest.mark.parametrize("style", ["norm", "neox"])
def test_rotation_leaves_what_is_beyond_the_rotary_dimensions(style: str) -> None:
    heads, dim, half = 3, 20, 8
    x = RANDOM.standard_normal((4, heads * dim)).astype(np.float32)
    angles = np.outer(np.arange(9), 0.3 ** np.arange(half))
    cos, sin = (f(angles).astype(np.float32) for f in (np.cos, np.sin))
    tensor = torch.from_numpy(x.copy())
    rotate(tensor, torch.from_numpy(cos[5:9]), torch.from_numpy(sin[5:9]), heads, style)
    expected = reference.rope(x.astype(np.float64), cos, sin, heads, 5, style)
    assert np.abs(tensor.numpy() - expected).max() <= 4 * EPS * np.abs(x).max()
    assert np.array_equal(
        tensor.numpy().reshape(4, heads, dim)[..., 2 * half :], x.reshape(4, heads, dim)[..., 2 * half :]
    )


def held(kind: str, kv_heads: int, context: int, dim: int) -> HeldVectors:
    """Vectors that are NaN until they are stored."""
    if kind == "f16":
        return HeldVectors(torch.full((kv_heads, context, dim), torch.nan, dtype=torch.float16), None)
    scales = torch.full((kv_heads, context, dim // 32), torch.nan, dtype=torch.float16)
    return HeldVectors(torch.ones((kv_heads, context, dim), dtype=torch.int8), scales)


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (5, 0.0), (0, 3.0), (11, 2.0)])
def test_attention_in_pieces(kind: str, window: int, softcap: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against float64 over what the cache holds; positions that were never written are NaN."""
    monkeypatch.setattr(hot_cache, "QUERIES_AT_ONCE", 3)
    monkeypatch.setattr(hot_cache, "KEYS_AT_ONCE", 4)
    heads, kv_heads, dim, context = 4, 2, 32, 40
    keys, values = (RANDOM.standard_normal((24, kv_heads * dim)).astype(np.float32) for _ in range(2))
    query = RANDOM.standard_normal((24, heads * dim)).astype(np.float32)
    cache = HotCache(held(kind, kv_heads, context, dim), held(kind, kv_heads, context, dim))
    attending, space = Attending(heads, 0.2, window, softcap), torch.empty(3 * heads * context)
    kept = reference.quantized_cache if kind == "q8_0" else lambda x: x.astype(np.float16)
    wide = [kept(x.reshape(24, kv_heads, dim).astype(np.float64)).astype(np.float64) for x in (keys, values)]
    # 13 tokens, three of which are taken back, then pieces of 8 and one by one.
    for first, last in ((0, 13), (10, 18), *((i, i + 1) for i in range(18, 24))):
        cache.store(torch.arange(first, last), *(torch.from_numpy(x[first:last]) for x in (keys, values)))
        out = torch.empty(last - first, heads * dim)
        attending.attend(torch.from_numpy(query[first:last]), cache, first, space, out)
        expected = reference.attention(
            query[first:last].reshape(-1, heads, dim).astype(np.float64),
            *(x[:last] for x in wide), 0.2, first, window, softcap,
        )  # fmt: skip
        # A score is a sum of 32 products of size 3 · 3 at most times 0.2; its error moves the weights.
        bound = 100 * EPS * 32 * 9 * 0.2 if kind == "f16" else 2.0**-9
        error = np.abs(out.numpy().reshape(expected.shape) - expected).max()
        assert error <= bound * np.abs(wide[1]).max()


def test_a_product_is_the_same_in_chunks_and_unpacked() -> None:
    rows = RANDOM.standard_normal((1100, 64)).astype(np.float32)
    data, x = torch.from_numpy(rows), torch.from_numpy(RANDOM.standard_normal((5, 64)).astype(np.float32))
    bias = torch.from_numpy(RANDOM.standard_normal(1100).astype(np.float32))
    chunk, expected = torch.empty(512 * 64), x.numpy().astype(np.float64) @ rows.T + bias.numpy()
    for kept in (UnpackedRows(RowType.F32, data), FileRows(RowType.F32, data.view(torch.uint8))):
        out = torch.empty(5, 1100)
        Product(kept, 1100, 64, bias).times(Inputs(x, x), chunk, out)
        assert np.abs(out.numpy() - expected).max() <= 65 * EPS * 64 * 16


def test_products_do_not_depend_on_where_rows_lie_in_memory() -> None:
    """Products of torch round by the address of a matrix: an unpacked one begins at a multiple of 64 bytes,
    wherever NumPy had room for its source."""
    memory = Arena()
    memory.fill(torch.empty(0, dtype=torch.uint8))
    form = Form(memory, fused=False, unpack=True)
    source = RANDOM.standard_normal((36, 64)).astype(np.float32).view(np.uint8)
    kept = [form.rows(source, RowType.F32, 64) for _ in range(16)]
    assert all(isinstance(rows, UnpackedRows) and rows.data.data_ptr() % 64 == 0 for rows in kept)
    assert all(torch.equal(rows.chunk(0, 36, torch.empty(0)), kept[0].data) for rows in kept)
