"""Reading planar rows in Triton: tiles of codes, and the weights of one lane of them.

Device functions, for the kernels of :mod:`powerinfer_kernels.triton_ffn`. The layout is that of
:mod:`powerinfer_kernels.triton_layout`. A tile is BLOCK rows by W words, W as :func:`tile_words` says;
``row`` [BLOCK] are its rows, ``live`` [BLOCK, 1] says which of them may be read at all, ``tile`` is its
place in the rows. Parameters carry no annotations but constexpr: Triton reads them.
"""

import triton
import triton.language as tl

F16 = tl.constexpr(1)
Q4_0 = tl.constexpr(2)
Q4_1 = tl.constexpr(3)
Q8_0 = tl.constexpr(8)
Q4_K = tl.constexpr(12)
Q6_K = tl.constexpr(14)


@triton.constexpr_function
def lanes(TYPE):
    """Codes in a word; an F16 word is one value."""
    return {1: 1, 8: 4}.get(TYPE, 8)


@triton.constexpr_function
def tile_words(TYPE):
    """Words in a tile."""
    return 128 if TYPE == 1 else 32


@triton.constexpr_function
def row_words(COLUMNS, TYPE):
    """Words in a row."""
    return COLUMNS // lanes(TYPE)


@triton.constexpr_function
def tiles(COLUMNS, TYPE):
    """Tiles in a row."""
    return -(-row_words(COLUMNS, TYPE) // tile_words(TYPE))


@triton.constexpr_function
def is_whole(COLUMNS, TYPE):
    """Whether a tile is one chunk, so that each of its lanes is one block of 32 columns (or F16)."""
    return TYPE == 1 or row_words(COLUMNS, TYPE) % 32 == 0


@triton.constexpr_function
def plane_bytes(COLUMNS, TYPE):
    """Bytes of a row before its planes: sub, scale, minimum."""
    stored = COLUMNS // 256
    codes = COLUMNS if TYPE == 8 else COLUMNS // 2
    sub = codes + (64 * stored if TYPE == 14 else 0)
    scale = sub + {12: 12, 14: 16}.get(TYPE, 0) * stored
    blocks = stored if TYPE in (12, 14) else COLUMNS // 32
    return codes, sub, scale, scale + 2 * blocks, blocks


@triton.jit
def words_of(tile, TYPE: tl.constexpr):
    """The words [W] of the tile."""
    return tile * tile_words(TYPE) + tl.arange(0, tile_words(TYPE))


@triton.jit
def columns_of(tile, LANE: tl.constexpr, COLUMNS: tl.constexpr, TYPE: tl.constexpr):
    """The columns [W] that lane LANE of the tile's words holds."""
    if is_whole(COLUMNS, TYPE):
        columns = (tile * lanes(TYPE) + LANE) * tile_words(TYPE) + tl.arange(0, tile_words(TYPE))
    else:
        length: tl.constexpr = 32 // lanes(TYPE)
        word = words_of(tile, TYPE)
        columns = word // length * 32 + LANE * length + word % length
    return columns


@triton.jit
def load_words(base, rows, row, tile, live, BEFORE: tl.constexpr, kind: tl.constexpr, COLUMNS: tl.constexpr,
               TYPE: tl.constexpr):  # fmt: skip
    """The tile [BLOCK, W] of the plane that begins after BEFORE bytes a row: one item for each word."""
    word = words_of(tile, TYPE)[None, :]
    base = (base + rows.to(tl.int64) * BEFORE).to(tl.pointer_type(kind), bitcast=True)
    at = base + row.to(tl.int64)[:, None] * row_words(COLUMNS, TYPE) + word
    return tl.load(at, mask=live & (word < row_words(COLUMNS, TYPE)), other=0)


@triton.jit
def load_codes(base, rows, row, tile, live, COLUMNS: tl.constexpr, TYPE: tl.constexpr):
    """The tile's codes [BLOCK, W] (F16: its values) and their upper bits (Q6_K; 0 otherwise)."""
    high = 0
    if TYPE == F16:
        codes = load_words(base, rows, row, tile, live, 0, tl.float16, COLUMNS, TYPE)
    else:
        codes = load_words(base, rows, row, tile, live, 0, tl.int32, COLUMNS, TYPE)
    if TYPE == Q6_K:
        high = load_words(base, rows, row, tile, live, COLUMNS // 2, tl.int16, COLUMNS, TYPE).to(tl.int32)
    return codes, high


@triton.jit
def load_scale(base, rows, row, block, live, BEFORE: tl.constexpr, BLOCKS: tl.constexpr):
    """The f16 of block ``block`` (a number, or [1, W]) of each row, as float32."""
    base = (base + rows.to(tl.int64) * BEFORE).to(tl.pointer_type(tl.float16), bitcast=True)
    at = base + row.to(tl.int64)[:, None] * BLOCKS + block
    return tl.load(at, mask=live, other=0.0).to(tl.float32)


@triton.jit
def load_sub(base, rows, row, tile, live, INDEX: tl.constexpr, COUNT: tl.constexpr, COLUMNS: tl.constexpr,
             TYPE: tl.constexpr):  # fmt: skip
    """Word INDEX of the COUNT words of packed sub-block scales of super-block ``tile``: [BLOCK, 1]."""
    before: tl.constexpr = plane_bytes(COLUMNS, TYPE)[1]
    base = (base + rows.to(tl.int64) * before).to(tl.pointer_type(tl.int32), bitcast=True)
    at = base + (row.to(tl.int64)[:, None] * (COLUMNS // 256) + tile) * COUNT + INDEX
    return tl.load(at, mask=live, other=0)


@triton.jit
def six_bits(low, mixed, SHIFT: tl.constexpr, LANE: tl.constexpr):
    """The 6-bit scale (``low`` is word 0, SHIFT 0) or minimum (word 1, SHIFT 4) of sub-block LANE; ``mixed``
    is word 2, with the low nibbles of the last four."""
    at: tl.constexpr = 8 * (LANE % 4)
    if LANE < 4:
        value = (low >> at) & 63
    else:
        value = ((mixed >> (at + SHIFT)) & 15) | (((low >> (at + 6)) & 3) << 4)
    return value.to(tl.float32)


@triton.jit
def q4_k(codes, base, rows, row, tile, live, LANE: tl.constexpr, COLUMNS: tl.constexpr):
    """d · scale · code − dmin · minimum of sub-block LANE."""
    before: tl.constexpr = plane_bytes(COLUMNS, Q4_K)
    mixed = load_sub(base, rows, row, tile, live, 2, 3, COLUMNS, Q4_K)
    scale = six_bits(load_sub(base, rows, row, tile, live, 0, 3, COLUMNS, Q4_K), mixed, 0, LANE)
    minimum = six_bits(load_sub(base, rows, row, tile, live, 1, 3, COLUMNS, Q4_K), mixed, 4, LANE)
    scale *= load_scale(base, rows, row, tile, live, before[2], before[4])
    minimum *= load_scale(base, rows, row, tile, live, before[3], before[4])
    return scale * ((codes >> (4 * LANE)) & 15).to(tl.float32) - minimum


@triton.jit
def q6_k(codes, high, base, rows, row, tile, live, LANE: tl.constexpr, COLUMNS: tl.constexpr):
    """d · scale · (code − 32); a lane's 32 columns have two scales."""
    before: tl.constexpr = plane_bytes(COLUMNS, Q6_K)
    pair = load_sub(base, rows, row, tile, live, LANE // 2, 4, COLUMNS, Q6_K) >> (16 * (LANE % 2))
    half = (tl.arange(0, 32) // 16 * 8)[None, :]
    sub = (((pair >> half) << 24) >> 24).to(tl.float32)
    code = ((codes >> (4 * LANE)) & 15) | (((high >> (2 * LANE)) & 3) << 4)
    scale = load_scale(base, rows, row, tile, live, before[2], before[4])
    return scale * sub * (code - 32).to(tl.float32)


@triton.jit
def weights(codes, high, base, rows, row, tile, live, LANE: tl.constexpr, COLUMNS: tl.constexpr,
            TYPE: tl.constexpr):  # fmt: skip
    """float32 [BLOCK, W]: the weights in lane LANE of the tile; 0 in rows that are not ``live``."""
    before: tl.constexpr = plane_bytes(COLUMNS, TYPE)
    if is_whole(COLUMNS, TYPE):
        block = tile * lanes(TYPE) + LANE
    else:
        block = (words_of(tile, TYPE) // (32 // lanes(TYPE)))[None, :]
        live = live & (block < before[4])
    if TYPE == F16:
        out = codes.to(tl.float32)
    elif TYPE == Q4_K:
        out = q4_k(codes, base, rows, row, tile, live, LANE, COLUMNS)
    elif TYPE == Q6_K:
        out = q6_k(codes, high, base, rows, row, tile, live, LANE, COLUMNS)
    else:
        scale = load_scale(base, rows, row, block, live, before[2], before[4])
        if TYPE == Q8_0:
            out = scale * ((codes << (24 - 8 * LANE)) >> 24).to(tl.float32)
        elif TYPE == Q4_0:
            out = scale * (((codes >> (4 * LANE)) & 15) - 8).to(tl.float32)
        else:
            out = scale * ((codes >> (4 * LANE)) & 15).to(tl.float32)
            out += load_scale(base, rows, row, block, live, before[3], before[4])
    return out
