"""Reading planar rows in Triton: tiles of codes, their scales, and sums of whole numbers over them.

Device functions, for the kernels of :mod:`powerinfer_kernels.triton_ffn`. The layout is that of
:mod:`powerinfer_kernels.triton_layout`. A tile is R rows by BLOCKS blocks of 32 columns; ``row`` [R, 1] are
its rows, ``block`` [1, BLOCKS] its blocks, ``live`` [R, BLOCKS] says which of them may be read at all.
Parameters carry no annotations but constexpr: Triton reads them.

Codes are kept four to a word, as signed bytes. ``low`` and ``high`` [R, BLOCKS, 4] have columns 4i … 4i + 3
and 16 + 4i … of a block in word i.
"""

import triton
import triton.language as tl

#: Whether kernels are compiled, and may have instructions that Triton's interpreter has not.
COMPILED = tl.constexpr(not triton.knobs.runtime.interpret)
F16 = tl.constexpr(1)
Q4_0 = tl.constexpr(2)
Q4_1 = tl.constexpr(3)
Q5_0 = tl.constexpr(6)
Q8_0 = tl.constexpr(8)
Q2_K = tl.constexpr(10)
Q3_K = tl.constexpr(11)
Q6_K = tl.constexpr(14)
BF16 = tl.constexpr(30)
MXFP4 = tl.constexpr(39)
NVFP4 = tl.constexpr(40)
#: Blocks in a tile of codes, and values in a tile of floats.
BLOCKS = tl.constexpr(16)
VALUES = tl.constexpr(128)


@triton.constexpr_function
def is_float(TYPE):
    """F16 and BF16: values, not codes."""
    return TYPE in (1, 30)


@triton.constexpr_function
def tiles(COLUMNS, TYPE):
    """Tiles in a row."""
    return -(-COLUMNS // (128 if TYPE in (1, 30) else 32 * 16))


@triton.constexpr_function
def high_bits(TYPE):
    """Bits of a code beyond a nibble."""
    return {6: 1, 7: 1, 13: 1, 14: 2}.get(TYPE, 0)


@triton.constexpr_function
def offset(TYPE):
    """What is taken from a code."""
    return {2: 8, 6: 16, 11: 4, 14: 32}.get(TYPE, 0)


@triton.constexpr_function
def table(TYPE):
    """The sixteen signed bytes that codes stand for, as four words; None where they stand for themselves."""
    iq2, e2m1 = (2824456, 0, 14018552, 0), (50462976, 201852420, -33620224, -185009412)
    iq4, iq1 = (-1079142271, -152379953, 639175937, 1901675829), (590329, 524279, 0, 0)
    iq3_xxs, iq3_s = (
        (471075844, 1043606564, -454232836, -1026763556),
        (117768961, 252513033, -100925953, -235670025),
    )
    kinds = {20: iq4, 23: iq4, 39: e2m1, 40: e2m1, 18: iq3_xxs, 21: iq3_s, 16: iq2, 17: iq2, 19: iq1, 29: iq1}
    return kinds.get(TYPE)


@triton.constexpr_function
def sub_bytes(TYPE):
    """Bytes of sub-block scales in a super-block of 256 columns."""
    sizes = {10: 16, 11: 16, 12: 12, 13: 12, 14: 16, 16: 8, 17: 16, 18: 8, 19: 8, 21: 8, 23: 8, 29: 16}
    return sizes.get(TYPE, 0)


@triton.constexpr_function
def scale_bytes(TYPE):
    """Bytes of a scale: a half or a single precision number, or an exponent."""
    return {39: 1, 10: 4, 11: 4, 16: 4, 17: 4, 18: 4, 19: 4, 21: 4, 23: 4, 29: 4}.get(TYPE, 2)


@triton.constexpr_function
def has_minimum(TYPE):
    """Whether something is added to each weight of a block."""
    return TYPE in (3, 7, 10, 12, 13)


@triton.constexpr_function
def has_halves(TYPE):
    """Whether 16 columns have a scale of their own."""
    return TYPE in (10, 11, 14, 17, 29, 40)


@triton.constexpr_function
def scales_of(COLUMNS, TYPE):
    """Scales of a row."""
    return COLUMNS // (256 if sub_bytes(TYPE) else 32)


@triton.constexpr_function
def bytes_before(COLUMNS, TYPE, PLANE):
    """Bytes of a row before its plane: 0 codes, 1 high, 2 sub, 3 scale, 4 minimum."""
    sizes = (
        COLUMNS if TYPE == 8 else COLUMNS // 2,
        COLUMNS // 8 * high_bits(TYPE),
        COLUMNS // 256 * sub_bytes(TYPE),
        scales_of(COLUMNS, TYPE) * scale_bytes(TYPE),
    )
    return sum(sizes[:PLANE])


@triton.jit
def dp4a(a, b, c):
    """c + Σ a_i · b_i over the four signed bytes of the words a and b, in whole numbers."""
    if COMPILED:
        out = tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        out = c
        for byte in tl.static_range(4):
            out = out + signed_byte(a, byte) * signed_byte(b, byte)
    return out


@triton.jit
def picked(a, b, which):
    """The word of those bytes of a (0 … 3) and b (4 … 7) that the lowest four nibbles of ``which`` name."""
    if COMPILED:
        out = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, which], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        none = which & 0
        out = none
        for byte in tl.static_range(4):
            index = (which >> (4 * byte)) & 7
            word = tl.where(index < 4, none + a, none + b)
            out = out | (((word >> (8 * (index & 3))) & 255) << (8 * byte))
    return out


@triton.jit
def signed_byte(words, BYTE: tl.constexpr):
    """Byte BYTE of each word, with its sign."""
    return (words << (24 - 8 * BYTE)) >> 24


@triton.jit
def looked_up(nibbles, TYPE: tl.constexpr):
    """What the eight nibbles of each word stand for: of the even ones, and of the odd ones."""
    words: tl.constexpr = table(TYPE)
    which, upper = nibbles & 0x77777777, (nibbles & -0x77777778) >> 1
    upper = (upper & 0x44444444) | 0x32103210
    first = picked(picked(words[0], words[1], which), picked(words[2], words[3], which), upper)
    which, upper = which >> 16, upper >> 16
    second = picked(picked(words[0], words[1], which), picked(words[2], words[3], which), upper)
    none = nibbles & 0
    return picked(first, second, none + 0x6420), picked(first, second, none + 0x7531)


@triton.jit
def signed(words, OFFSET: tl.constexpr):
    """Bytes of 0 … 63 less OFFSET, as signed bytes."""
    if OFFSET > 0:
        words = (words + (128 - OFFSET) * 0x01010101) ^ -0x7F7F7F80
    return words


@triton.jit
def load_words(base, rows, row, item, live, BEFORE: tl.constexpr, PER_ROW: tl.constexpr):
    """Words of the plane that begins after BEFORE bytes a row; each row has PER_ROW of them."""
    base = (base + rows.to(tl.int64) * BEFORE).to(tl.pointer_type(tl.int32), bitcast=True)
    return tl.load(base + row.to(tl.int64) * PER_ROW + item, mask=live, other=0)


@triton.jit
def load_bytes(base, rows, row, item, live, BEFORE: tl.constexpr, PER_ROW: tl.constexpr, SIZE: tl.constexpr):
    """Of such a plane, PER_ROW items a row, item ``item`` of SIZE 1 or 2 bytes, in the lowest bits of an
    int32. Whole words are loaded where rows begin with them: what is smaller cannot be loaded ahead."""
    per_word: tl.constexpr = 4 // SIZE
    if PER_ROW % per_word == 0:
        out = load_words(base, rows, row, item // per_word, live, BEFORE, PER_ROW // per_word)
        out = out >> (8 * SIZE * (item % per_word))
    else:
        kind: tl.constexpr = tl.int8 if SIZE == 1 else tl.int16
        base = (base + rows.to(tl.int64) * BEFORE).to(tl.pointer_type(kind), bitcast=True)
        out = tl.load(base + row.to(tl.int64) * PER_ROW + item, mask=live, other=0).to(tl.int32)
    return out & (255 if SIZE == 1 else 65535)


@triton.jit
def load_codes(base, rows, row, block, live, COLUMNS: tl.constexpr, TYPE: tl.constexpr):
    """``low`` and ``high`` of the tile's codes; 0 where not ``live``."""
    row, block, live = row[:, :, None], block[:, :, None], live[:, :, None]
    i = tl.arange(0, 4)[None, None, :]
    if TYPE == Q8_0:
        low = load_words(base, rows, row, block * 8 + i, live, 0, COLUMNS // 4)
        high = load_words(base, rows, row, block * 8 + 4 + i, live, 0, COLUMNS // 4)
    else:
        words = load_words(base, rows, row, block * 4 + i, live, 0, COLUMNS // 8)
        if table(TYPE) is not None:
            low, high = looked_up(words, TYPE)
        else:
            low, high = words & 0x0F0F0F0F, (words >> 4) & 0x0F0F0F0F
            before: tl.constexpr = bytes_before(COLUMNS, TYPE, 1)
            if high_bits(TYPE) == 1:
                more = load_words(base, rows, row, block, live, before, COLUMNS // 32)
                low |= ((more >> i) & 0x01010101) << 4
                high |= ((more >> (4 + i)) & 0x01010101) << 4
            elif high_bits(TYPE) == 2:
                more = load_words(base, rows, row, block * 2, live, before, COLUMNS // 16)
                low |= ((more >> (2 * i)) & 0x03030303) << 4
                more = load_words(base, rows, row, block * 2 + 1, live, before, COLUMNS // 16)
                high |= ((more >> (2 * i)) & 0x03030303) << 4
            low, high = signed(low, offset(TYPE)), signed(high, offset(TYPE))
    return low, high


@triton.jit
def load_numbers(
    base, rows, row, block, live, PLANE: tl.constexpr, COLUMNS: tl.constexpr, TYPE: tl.constexpr
):
    """float32 of each block from the plane of scales (3), or of minima (4)."""
    before: tl.constexpr = bytes_before(COLUMNS, TYPE, PLANE)
    count: tl.constexpr = scales_of(COLUMNS, TYPE)
    item = block
    if sub_bytes(TYPE) > 0:
        item = block // 8
    if TYPE == MXFP4:
        exponent = load_bytes(base, rows, row, item, live, before, count, 1)
        # The least two are subnormal.
        bits = tl.maximum((exponent - 1) << 23, (exponent + 1) << 21)
        out = bits.to(tl.float32, bitcast=True)
    elif scale_bytes(TYPE) == 4:
        out = load_words(base, rows, row, item, live, before, count).to(tl.float32, bitcast=True)
    else:
        bits = load_bytes(base, rows, row, item, live, before, count, 2)
        out = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return out


@triton.jit
def six_bits(base, rows, row, block, live, COLUMNS: tl.constexpr, TYPE: tl.constexpr):
    """The 6-bit scale and minimum of each block, from the twelve bytes of its super-block."""
    before: tl.constexpr = bytes_before(COLUMNS, TYPE, 2)
    count: tl.constexpr = COLUMNS // 256 * 3
    at, shift = block // 8 * 3, 8 * (block % 4)
    low = load_words(base, rows, row, at, live, before, count) >> shift
    middle = load_words(base, rows, row, at + 1, live, before, count) >> shift
    mixed = load_words(base, rows, row, at + 2, live, before, count) >> shift
    whole = block % 8 < 4
    scale = tl.where(whole, low & 63, (mixed & 15) | ((low >> 2) & 48))
    minimum = tl.where(whole, middle & 63, ((mixed >> 4) & 15) | ((middle >> 2) & 48))
    return scale.to(tl.float32), minimum.to(tl.float32)


@triton.jit
def half_scales(base, rows, row, block, live, COLUMNS: tl.constexpr, TYPE: tl.constexpr):
    """What multiplies the scale in each half of a block: integers (NVFP4: float32)."""
    before: tl.constexpr = bytes_before(COLUMNS, TYPE, 3 if TYPE == NVFP4 else 2)
    both = load_bytes(base, rows, row, block, live, before, COLUMNS // 32, 2)
    first, second = both & 255, both >> 8
    if TYPE == NVFP4:
        first, second = float8(first), float8(second)
    elif TYPE != Q2_K:
        first, second = signed_byte(first, 0), signed_byte(second, 0)
    return first, second


@triton.jit
def float8(bits):
    """Half of an E4M3 number without a sign."""
    exponent, fraction = (bits >> 3) & 15, bits & 7
    power = ((tl.maximum(exponent, 1) + 116) << 23).to(tl.float32, bitcast=True)
    return tl.where(exponent == 0, fraction, fraction + 8).to(tl.float32) * power


@triton.jit
def load_scales(base, rows, row, block, live, COLUMNS: tl.constexpr, TYPE: tl.constexpr):
    """Of each block: its scale, what multiplies that in each half, what is added to its weights, and what
    multiplies that in each half. ``scale`` and ``minimum`` are float32; the others integers (NVFP4: float32),
    all 1 where 16 columns have no numbers of their own; minima 0 where there are none."""
    scale = live.to(tl.float32)
    minimum, first, second, below, above = scale * 0.0, 1, 1, 1, 1
    if TYPE != NVFP4:
        scale = load_numbers(base, rows, row, block, live, 3, COLUMNS, TYPE)
    if has_minimum(TYPE):
        minimum = load_numbers(base, rows, row, block, live, 4, COLUMNS, TYPE)
    if sub_bytes(TYPE) == 12:
        more, less = six_bits(base, rows, row, block, live, COLUMNS, TYPE)
        scale, minimum = scale * more, -(minimum * less)
    elif has_halves(TYPE):
        first, second = half_scales(base, rows, row, block, live, COLUMNS, TYPE)
        if TYPE == Q2_K:
            first, second, below, above = first & 15, second & 15, first >> 4, second >> 4
            minimum = -minimum
    elif sub_bytes(TYPE) == 8:
        byte = load_bytes(base, rows, row, block, live, bytes_before(COLUMNS, TYPE, 2), COLUMNS // 32, 1)
        scale = scale * signed_byte(byte, 0).to(tl.float32)
    return scale, first, second, minimum, below, above


@triton.jit
def half_of(scale, first, second, HALF: tl.constexpr):
    """The scale [R, BLOCKS, 1] of a half of each block."""
    if HALF == 0:
        out = scale * first
    else:
        out = scale * second
    return out[:, :, None]


@triton.jit
def load_values(base, row, live, tile, COLUMNS: tl.constexpr, TYPE: tl.constexpr):
    """float32 [R, VALUES] of rows of floats; ``row`` and ``live`` are [R, 1]."""
    column = tile * VALUES + tl.arange(0, VALUES)[None, :]
    at, mask = row.to(tl.int64) * COLUMNS + column, live & (column < COLUMNS)
    if TYPE == F16:
        base = base.to(tl.pointer_type(tl.float16), bitcast=True)
        out = tl.load(base + at, mask=mask, other=0.0).to(tl.float32)
    else:
        base = base.to(tl.pointer_type(tl.int16), bitcast=True)
        bits = tl.load(base + at, mask=mask, other=0).to(tl.int32) << 16
        out = bits.to(tl.float32, bitcast=True)
    return out
