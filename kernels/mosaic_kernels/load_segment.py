"""Device code that reads K or V of some tokens, of segments of any format (segment_table.py).

A tile has channels along its first dimension and tokens along its second. `segment` is one pointer or, where every
token has a segment of its own, [1, T] pointers; `row` and `kind` are as many. `t` is int32 [1, T], the tokens in their
segments. What belongs to a channel is then [D, T] instead of [D, 1]. Planes can also be read with [groups, T], all rows
alike (tile_attention.py). Tokens kept as exceptions have arbitrary codes; `exceptions` and its kin say which they are.

Codes are unpacked four at a time, whatever their widths: one rotation and one mask of a 32-bit word put four bases
where they belong in four bytes, the refinement is added likewise, and every byte becomes a float16 by bit operations
(integer conversions run at a quarter of the rate).
"""

import triton
import triton.language as tl

from mosaic_kernels import segment_table
from mosaic_kernels.load_words import load_four, load_two
from mosaic_kernels.unpack_bytes import four, unpack_affine, unpack_bytes

PLANES = tl.constexpr(segment_table.PLANES)
TOPK = tl.constexpr(segment_table.TOPK)
INVALID = tl.constexpr(segment_table.INVALID)
_SCALARS = tl.constexpr(segment_table.SCALARS)
_WORDS = tl.constexpr(segment_table.WORDS)
_K = tl.constexpr(segment_table.KIND)
_V = tl.constexpr(segment_table.V_CODED)
_EXCEPTIONS = tl.constexpr(segment_table.EXCEPTIONS)
_EXCEPTION_TOKENS = tl.constexpr(segment_table.EXCEPTION_TOKENS)
_EXCEPTION_K = tl.constexpr(segment_table.EXCEPTION_K)
_EXCEPTION_V = tl.constexpr(segment_table.EXCEPTION_V)
_TOPK_KEEP = tl.constexpr(segment_table.TOPK_KEEP)
_TOPK_SCALES = tl.constexpr(segment_table.TOPK_SCALES)
_TOPK_BITMAP = tl.constexpr(segment_table.TOPK_BITMAP)
_TOPK_VALUES = tl.constexpr(segment_table.TOPK_VALUES)
_EVERY_BYTE = tl.constexpr(0x01010101)
_SIGNS = tl.constexpr(0x80808080)


@triton.jit
def load_number(segment):
    """Number of a segment's format; it may be none."""
    return load_byte(segment, 0)


@triton.jit
def find_row(number, scalars, first_row, FORMATS: tl.constexpr):
    """Row of a format, and its kind; INVALID: no format has the number, or it is of one that is not to occur."""
    row = first_row + tl.minimum(number, FORMATS - 1)
    kind, _, _, _ = load_four(scalars + row * _SCALARS + _K)
    return row, tl.where(number < FORMATS, kind, INVALID)


@triton.jit
def fetch_keys(
    segment, scalars, words, row, t, channels,
    CHUNK: tl.constexpr, GROUPS: tl.constexpr, REFINED: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """What `plane_keys` unpacks: GROUPS groups of K of planes from group CHUNK * GROUPS on, as they lie in memory.

    Of the first `channels` of K; WIDTH is K's dimension filled up to a power of two. Loads that wait for nothing but
    tables: early ones overlap with what comes between.
    """
    group = CHUNK * GROUPS + tl.arange(0, GROUPS)[:, None]
    _, _, scales_at, offsets_at = load_four(scalars + row * _SCALARS + _K)
    rows = _fetch_rows(segment, words, row, t, group, channels, REFINED, WIDTH)
    shape: tl.constexpr = [GROUPS, t.shape[1]]
    scales = tl.broadcast_to((segment + scales_at).to(tl.pointer_type(tl.uint64)) + group * 4, shape)
    offsets = tl.broadcast_to((segment + offsets_at).to(tl.pointer_type(tl.uint64)) + group * 4, shape)
    has_codes, has_offset = rows[4] & 0xFF > 0, group * 16 < channels
    scale0, scale1 = load_two(scales, has_codes)
    scale2, scale3 = load_two(scales + 2, has_codes)
    offset0, offset1 = load_two(offsets, has_offset)
    offset2, offset3 = load_two(offsets + 2, has_offset)
    return rows, (scale0, scale1, scale2, scale3), (offset0, offset1, offset2, offset3)


@triton.jit
def plane_keys(fetched, GROUPS: tl.constexpr, REFINED: tl.constexpr):
    """K of `fetch_keys`: float16 [T, GROUPS * 16], channels as `key_channels`; from `channels` on 0.

    Tokens come first, unlike in other tiles. Without refinement, a code is the middle of those that share its base.
    """
    rows, scales, offsets = fetched
    q0, q1, q2, q3, more = _plane_quads(rows, REFINED)
    u0 = unpack_affine(q0, more, scales[0], offsets[0])
    u1 = unpack_affine(q1, more, scales[1], offsets[1])
    u2 = unpack_affine(q2, more, scales[2], offsets[2])
    u3 = unpack_affine(q3, more, scales[3], offsets[3])
    # [groups, T, channel / 2 % 2, channel % 2, quad / 2, quad % 2]
    joined = tl.join(tl.join(u0, u2), tl.join(u1, u3))
    return tl.reshape(tl.permute(joined, 1, 4, 5, 0, 2, 3), [q0.shape[1], GROUPS * 16])


@triton.jit
def key_channels(CHUNK: tl.constexpr, GROUPS: tl.constexpr):
    """Which channel each column of `plane_keys` is, int32 [GROUPS * 16].

    With four groups and one warp it is the order in which a thread that unpacked them hands them to a tensor core:
    nothing has to change places. Queries are loaded in the same order.
    """
    at = tl.arange(0, GROUPS * 16)
    return (CHUNK * GROUPS + at // 4 % GROUPS) * 16 + at // (4 * GROUPS) * 4 + at % 4


@triton.jit
def fetch_values(
    segment, words, row, t, CHUNK: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr
):
    """What `plane_values` unpacks: GROUPS groups of V of planes from group CHUNK * GROUPS on."""
    group = CHUNK * GROUPS + tl.arange(0, GROUPS)[:, None]
    return _fetch_rows(segment, words, row, t, group, DIM, True, WIDTH)


@triton.jit
def plane_values(fetched, GROUPS: tl.constexpr):
    """V of `fetch_values`, in scales of the token (`value_scales`): float16 [GROUPS * 16, T], exact; channels without
    codes 0 (`mean_values`)."""
    levels = fetched[5]
    q0, q1, q2, q3, more = _plane_quads(fetched, True)
    factors, terms = four(levels.to(tl.uint16)), four((levels >> 16).to(tl.uint16))
    return _tile(
        unpack_affine(q0, more, factors, terms),
        unpack_affine(q1, more, factors, terms),
        unpack_affine(q2, more, factors, terms),
        unpack_affine(q3, more, factors, terms),
        GROUPS * 16,
    )


@triton.jit
def value_scales(segment, scalars, row, t):
    """V's scale of each token of planes, float32 [1, T]; 0 if nothing is coded."""
    coded, scales_at, _, _ = load_four(scalars + row * _SCALARS + _V)
    some = t < tl.where(coded > 0, 256, 0)
    return scale_of(load_byte(segment, scales_at + t, some))


@triton.jit
def value_channels(scalars, row):
    """Channels of V that have codes; the others are their page's mean."""
    coded, _, _, _ = load_four(scalars + row * _SCALARS + _V)
    return coded


@triton.jit
def mean_values(segment, scalars, row, CHUNK: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr):
    """Mean V of segments of planes, GROUPS groups from group CHUNK * GROUPS on: float16 [GROUPS * 16, 1 or T], exact
    in scales, and those float32 [1, 1 or T]."""
    _, _, means_at, scale_at = load_four(scalars + row * _SCALARS + _V)
    group = CHUNK * GROUPS + tl.arange(0, GROUPS)[:, None]
    # Beyond the last group, the last one again.
    means = (segment + means_at).to(tl.pointer_type(tl.int32)) + tl.minimum(group, DIM // 16 - 1) * 4
    w0, w1, w2, w3 = load_four(means)
    # A signed byte plus 128.
    less = tl.full([1, 1], -128.0, tl.float32)
    units = _tile(
        unpack_bytes(w0.to(tl.uint32, bitcast=True) ^ _SIGNS, less),
        unpack_bytes(w1.to(tl.uint32, bitcast=True) ^ _SIGNS, less),
        unpack_bytes(w2.to(tl.uint32, bitcast=True) ^ _SIGNS, less),
        unpack_bytes(w3.to(tl.uint32, bitcast=True) ^ _SIGNS, less),
        GROUPS * 16,
    )
    return units, scale_of(load_byte(segment, scale_at))


@triton.jit
def key_codes(segment, scalars, words, row, t, D: tl.constexpr, DIM: tl.constexpr):
    """K of planes in factors, exact: codes float16 [D, T], scale and offset float32 [D, 1 or T]."""
    c = tl.arange(0, D)[:, None]
    _, coded, scales_at, offsets_at = load_four(scalars + row * _SCALARS + _K)
    scales = (segment + scales_at).to(tl.pointer_type(tl.float16))
    offsets = (segment + offsets_at).to(tl.pointer_type(tl.float16))
    group = tl.arange(0, D // 16)[:, None]
    q0, q1, q2, q3, more = _plane_quads(_fetch_rows(segment, words, row, t, group, DIM, True, D), True)
    codes = _tile(unpack_bytes(q0, more), unpack_bytes(q1, more), unpack_bytes(q2, more), unpack_bytes(q3, more), D)
    scale = tl.load(scales + c, mask=c < coded, other=0).to(tl.float32)
    return codes, scale, tl.load(offsets + c, mask=c < DIM, other=0).to(tl.float32)


@triton.jit
def topk_codes(segment, scalars, row, t, channels, PART: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr):
    """K (PART 0) or V (1) of top-k: codes float16 [D, T] and token_scale [1, T]; no middle, channel_scale or offset."""
    of_row = scalars + row * _SCALARS
    keep, scales_at = tl.load(of_row + _TOPK_KEEP[PART]), tl.load(of_row + _TOPK_SCALES[PART])
    bitmap_at, values_at = tl.load(of_row + _TOPK_BITMAP[PART]), tl.load(of_row + _TOPK_VALUES[PART])
    c = tl.arange(0, D)[:, None]
    kept = tl.load(segment + bitmap_at + t * (DIM // 8) + c // 8, mask=c < channels, other=0).to(tl.int32) >> c % 8 & 1
    # The n-th set bit of a token has the n-th value.
    which = tl.cumsum(kept, 0) - 1
    values = (segment + values_at).to(tl.pointer_type(tl.int8))
    codes = tl.load(values + t * keep + which, mask=kept == 1, other=0)
    scales = (segment + scales_at).to(tl.pointer_type(tl.float16))
    return codes.to(tl.float16), tl.load(scales + t).to(tl.float32)


@triton.jit
def exceptions(scalars, row, kind):
    """How many tokens of a segment are kept as float16."""
    return tl.where(kind == PLANES, tl.load(scalars + row * _SCALARS + _EXCEPTIONS), 0)


@triton.jit
def exception_token(segment, scalars, row, e):
    """Which token exception `e` is."""
    return tl.load(segment + tl.load(scalars + row * _SCALARS + _EXCEPTION_TOKENS) + e).to(tl.int32)


@triton.jit
def exception_key(segment, scalars, row, e, channels, D: tl.constexpr, DIM: tl.constexpr):
    """The first `channels` of K of exception `e`, float32 [D, 1 or T]."""
    c = tl.arange(0, D)[:, None]
    at = (segment + tl.load(scalars + row * _SCALARS + _EXCEPTION_K)).to(tl.pointer_type(tl.float16))
    return tl.load(at + e * DIM + c, mask=c < channels, other=0).to(tl.float32)


@triton.jit
def exception_value(segment, scalars, row, e, D: tl.constexpr, DIM: tl.constexpr):
    """V of exception `e`, float32 [D, 1 or T]."""
    c = tl.arange(0, D)[:, None]
    at = (segment + tl.load(scalars + row * _SCALARS + _EXCEPTION_V)).to(tl.pointer_type(tl.float16))
    return tl.load(at + e * DIM + c, mask=c < DIM, other=0).to(tl.float32)


@triton.jit
def _fetch_rows(segment, words, row, t, group, channels, REFINED: tl.constexpr, WIDTH: tl.constexpr):
    """Words of groups [G, 1]: first and second of the base and of the refinement uint32 [G, T], bits (0 from `channels`
    on) and V's levels int32 [G, 1 or T]."""
    at = words + (row * (WIDTH // 16) + group) * _WORDS
    base, refinement, bits, levels = load_four(tl.broadcast_to(at, [group.shape[0], t.shape[1]]))
    bits = tl.where(group * 16 < channels, bits, 0)
    low, high = _row_words(segment, base, bits & 0xFF, t)
    if REFINED:
        more_low, more_high = _row_words(segment, refinement, bits >> 8, t)
        return low, high, more_low, more_high, bits, levels
    else:
        return low, high, low, high, bits, levels


@triton.jit
def _plane_quads(rows, REFINED: tl.constexpr):
    """Codes of the channels 0..3, 4..7, 8..11 and 12..15 of groups, uint32 [G, T] of four bytes each; and what to add
    to a code, float32 [G, 1 or T]."""
    low, high, more_low, more_high, bits, _ = rows
    base_bits, more_bits = bits & 0xFF, bits >> 8
    # Bases are put above the place of their refinement.
    q0, q1 = _quad(low, high, base_bits, 0, more_bits), _quad(low, high, base_bits, 1, more_bits)
    q2, q3 = _quad(low, high, base_bits, 2, more_bits), _quad(low, high, base_bits, 3, more_bits)
    if REFINED:
        q0, q1 = q0 | _quad(more_low, more_high, more_bits, 0, 0), q1 | _quad(more_low, more_high, more_bits, 1, 0)
        q2, q3 = q2 | _quad(more_low, more_high, more_bits, 2, 0), q3 | _quad(more_low, more_high, more_bits, 3, 0)
        return q0, q1, q2, q3, tl.full(bits.shape, 0.0, tl.float32)
    else:
        return q0, q1, q2, q3, ((1 << more_bits).to(tl.float32) - 1) * 0.5


@triton.jit
def _tile(u0, u1, u2, u3, D: tl.constexpr):
    """Four [groups, T, 2, 2] -> [D, T]."""
    # [groups, T, channel / 2 % 2, channel % 2, quad / 2, quad % 2]
    joined = tl.join(tl.join(u0, u2), tl.join(u1, u3))
    return tl.reshape(tl.permute(joined, 0, 4, 5, 2, 3, 1), [D, u0.shape[1]])


@triton.jit
def _row_words(segment, plane, bits, t):
    """The words of each group, uint32 [groups, T]: the first four bytes, and with four bits the others."""
    single = bits == 1
    at = (segment + (plane & 0xFFFF) + (t >> single.to(tl.int32)) * (plane >> 16)).to(tl.pointer_type(tl.uint32))
    # With one bit a row has two tokens, the odd one four places higher.
    low = tl.load(at, mask=bits > 0, other=0) >> tl.where(single, t % 2 * 4, 0).to(tl.uint32)
    return low, tl.load(at + 1, mask=bits == 4, other=0)


@triton.jit
def _quad(low, high, bits, Q: tl.constexpr, left):
    """The codes of channels 4 Q .. 4 Q + 3 of each group in the bytes of a word, `left` places from the right."""
    at = tl.where(bits == 4, Q // 2 * 4, Q * bits)
    word = tl.where(bits == 4, high, low) if Q % 2 else low
    turn = (left - at & 31).to(tl.uint32)
    turned = word << turn | word >> (32 - turn & 31)
    return turned & ((1 << bits) - 1 << left).to(tl.uint32) * _EVERY_BYTE


@triton.jit
def load_byte(segment, at, there=True):
    """The byte at an offset, int32; 0 where `there` is not. By a load of four bytes: one of a single byte would have
    Triton lay tiles out for products of bytes."""
    word = tl.load((segment + (at & -4)).to(tl.pointer_type(tl.int32)), mask=there, other=0)
    return word >> (at & 3) * 8 & 0xFF


@triton.jit
def scale_of(byte):
    """Bytes that hold the upper bits of a positive float16 -> float32."""
    return (byte.to(tl.int16) << 7).to(tl.float16, bitcast=True).to(tl.float32)
