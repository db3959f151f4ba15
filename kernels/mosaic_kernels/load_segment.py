"""Device code that reads K or V of some tokens, of segments of any format (segment_table.py).

A tile has channels along its first dimension and tokens along its second. `segment` is one pointer or, where every
token has a segment of its own, [1, T] pointers; `row` and `kind` are as many. `t` is int32 [1, T], the tokens in their
segments. What belongs to a channel is then [D, T] instead of [D, 1]. Tokens kept as exceptions have arbitrary codes;
`exceptions` and its kin say which they are.

Codes are unpacked four at a time, whatever their widths: one rotation and one mask of a 32-bit word put four bases
where they belong in four bytes, the refinement is added likewise, and every byte becomes a float16 by bit operations
(integer conversions run at a quarter of the rate).
"""

import triton
import triton.language as tl

from mosaic_kernels import segment_table
from mosaic_kernels.unpack_bytes import four, unpack_affine, unpack_bytes

PLANES = tl.constexpr(segment_table.PLANES)
TOPK = tl.constexpr(segment_table.TOPK)
INVALID = tl.constexpr(segment_table.INVALID)
_KIND = tl.constexpr(segment_table.KIND)
_SCALARS = tl.constexpr(segment_table.SCALARS)
_WORDS = tl.constexpr(segment_table.WORDS)
_BASE = tl.constexpr(segment_table.BASE)
_REFINEMENT = tl.constexpr(segment_table.REFINEMENT)
_BITS = tl.constexpr(segment_table.BITS)
_K_CODED = tl.constexpr(segment_table.K_CODED)
_K_SCALES = tl.constexpr(segment_table.K_SCALES)
_K_OFFSETS = tl.constexpr(segment_table.K_OFFSETS)
_V_CODED = tl.constexpr(segment_table.V_CODED)
_V_SCALES = tl.constexpr(segment_table.V_SCALES)
_MEAN_V = tl.constexpr(segment_table.MEAN_V)
_MEAN_SCALE = tl.constexpr(segment_table.MEAN_SCALE)
_EXCEPTIONS = tl.constexpr(segment_table.EXCEPTIONS)
_EXCEPTION_TOKENS = tl.constexpr(segment_table.EXCEPTION_TOKENS)
_EXCEPTION_K = tl.constexpr(segment_table.EXCEPTION_K)
_EXCEPTION_V = tl.constexpr(segment_table.EXCEPTION_V)
_TOPK_KEEP = tl.constexpr(segment_table.TOPK_KEEP)
_TOPK_SCALES = tl.constexpr(segment_table.TOPK_SCALES)
_TOPK_BITMAP = tl.constexpr(segment_table.TOPK_BITMAP)
_TOPK_VALUES = tl.constexpr(segment_table.TOPK_VALUES)
_EVERY_BYTE = tl.constexpr(0x01010101)


@triton.jit
def find_row(segment, scalars, first_row, FORMATS: tl.constexpr, ANY_TOPK: tl.constexpr, ANY_EXCEPTIONS: tl.constexpr):
    """Row of a segment's format, and its kind; INVALID: never encoded, or in a format that is not to occur."""
    number = tl.load(segment).to(tl.int32)
    row = first_row + tl.minimum(number, FORMATS - 1)
    kind = tl.where(number < FORMATS, tl.load(scalars + row * _SCALARS + _KIND), INVALID)
    if not ANY_TOPK:
        kind = tl.where(kind == TOPK, INVALID, kind)
    if not ANY_EXCEPTIONS:
        kind = tl.where(exceptions(scalars, row, kind) > 0, INVALID, kind)
    return row, kind


@triton.jit
def plane_keys(
    segment, scalars, words, row, t, channels,
    CHUNK: tl.constexpr, GROUPS: tl.constexpr, REFINED: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """GROUPS groups of K of planes from group CHUNK * GROUPS on: float16 [T, GROUPS * 16], channels as `key_channels`.

    Tokens come first, unlike in other tiles. The first `channels` of K, the others 0. WIDTH is K's dimension filled up
    to a power of two. Without refinement, a code is the middle of those that share its base.
    """
    group = CHUNK * GROUPS + tl.arange(0, GROUPS)[:, None]
    of_row = scalars + row * _SCALARS
    coded = tl.minimum(tl.load(of_row + _K_CODED), channels)
    scales = (segment + tl.load(of_row + _K_SCALES)).to(tl.pointer_type(tl.uint64)) + group * 4
    offsets = (segment + tl.load(of_row + _K_OFFSETS)).to(tl.pointer_type(tl.uint64)) + group * 4
    q0, q1, q2, q3, more = _plane_quads(segment, words, row, t, group, channels, REFINED, WIDTH)
    has_codes, has_offset = group * 16 < coded, group * 16 < channels
    u0 = unpack_affine(q0, more, tl.load(scales, has_codes, 0), tl.load(offsets, has_offset, 0))
    u1 = unpack_affine(q1, more, tl.load(scales + 1, has_codes, 0), tl.load(offsets + 1, has_offset, 0))
    u2 = unpack_affine(q2, more, tl.load(scales + 2, has_codes, 0), tl.load(offsets + 2, has_offset, 0))
    u3 = unpack_affine(q3, more, tl.load(scales + 3, has_codes, 0), tl.load(offsets + 3, has_offset, 0))
    # [groups, T, channel / 2 % 2, channel % 2, quad / 2, quad % 2]
    joined = tl.join(tl.join(u0, u2), tl.join(u1, u3))
    return tl.reshape(tl.permute(joined, 1, 4, 5, 0, 2, 3), [t.shape[1], GROUPS * 16])


@triton.jit
def key_channels(CHUNK: tl.constexpr, GROUPS: tl.constexpr):
    """Which channel each column of `plane_keys` is, int32 [GROUPS * 16].

    With four groups and one warp it is the order in which a thread that unpacked them hands them to a tensor core:
    nothing has to change places. Queries are loaded in the same order.
    """
    at = tl.arange(0, GROUPS * 16)
    return (CHUNK * GROUPS + at // 4 % GROUPS) * 16 + at // (4 * GROUPS) * 4 + at % 4


@triton.jit
def in_key_order(x, D: tl.constexpr):
    """[D, N] of all channels in their order -> [N, D] in that of `key_channels` with all groups."""
    split = tl.reshape(x, [D // 16, 4, 4, x.shape[1]])
    return tl.reshape(tl.permute(split, 3, 1, 0, 2), [x.shape[1], D])


@triton.jit
def plane_values(segment, scalars, words, levels, row, t, D: tl.constexpr, DIM: tl.constexpr):
    """V of planes in scales of its token: float16 [D, T], exact; uncoded channels 0 (`mean_values`). And those scales,
    float32 [1, T]."""
    of_levels = levels + row * (D // 8) + tl.arange(0, D // 16)[:, None]
    middle, step = tl.load(of_levels), tl.load(of_levels + D // 16)
    factors, terms = four(step.to(tl.float16)), four((-middle * step).to(tl.float16))
    group = tl.arange(0, D // 16)[:, None]
    q0, q1, q2, q3, more = _plane_quads(segment, words, row, t, group, DIM, True, D)
    values = _tile(
        unpack_affine(q0, more, factors, terms),
        unpack_affine(q1, more, factors, terms),
        unpack_affine(q2, more, factors, terms),
        unpack_affine(q3, more, factors, terms),
        D,
    )
    return values, value_scales(segment, scalars, row, t)


@triton.jit
def value_scales(segment, scalars, row, t):
    """V's scale of each token of planes, float32 [1, T]; 0 if nothing is coded."""
    of_row = scalars + row * _SCALARS
    some = t < tl.where(tl.load(of_row + _V_CODED) > 0, 256, 0)
    return _scale_of(tl.load(segment + tl.load(of_row + _V_SCALES) + t, mask=some, other=0))


@triton.jit
def value_channels(scalars, row):
    """Channels of V that have codes; the others are their page's mean."""
    return tl.load(scalars + row * _SCALARS + _V_CODED)


@triton.jit
def key_codes(segment, scalars, words, row, t, D: tl.constexpr, DIM: tl.constexpr):
    """K of planes in factors, exact: codes float16 [D, T], scale and offset float32 [D, 1 or T]."""
    c = tl.arange(0, D)[:, None]
    of_row = scalars + row * _SCALARS
    scales = (segment + tl.load(of_row + _K_SCALES)).to(tl.pointer_type(tl.float16))
    offsets = (segment + tl.load(of_row + _K_OFFSETS)).to(tl.pointer_type(tl.float16))
    group = tl.arange(0, D // 16)[:, None]
    q0, q1, q2, q3, more = _plane_quads(segment, words, row, t, group, DIM, True, D)
    codes = _tile(unpack_bytes(q0, more), unpack_bytes(q1, more), unpack_bytes(q2, more), unpack_bytes(q3, more), D)
    scale = tl.load(scales + c, mask=c < tl.load(of_row + _K_CODED), other=0).to(tl.float32)
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
def mean_values(segment, scalars, row, D: tl.constexpr, DIM: tl.constexpr):
    """Mean V of segments of planes, float32 [D, 1 or T]."""
    c = tl.arange(0, D)[:, None]
    of_row = scalars + row * _SCALARS
    means = (segment + tl.load(of_row + _MEAN_V)).to(tl.pointer_type(tl.int8))
    scale = _scale_of(tl.load(segment + tl.load(of_row + _MEAN_SCALE)))
    return tl.load(means + c, mask=c < DIM, other=0).to(tl.float32) * scale


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
def _plane_quads(segment, words, row, t, group, channels, REFINED: tl.constexpr, WIDTH: tl.constexpr):
    """Codes of the channels 0..3, 4..7, 8..11 and 12..15 of groups [G, 1], uint32 [G, T] of four bytes each.

    And what to add to a code, float32 [G, 1 or T].
    """
    of_row = words + row * (_WORDS * (WIDTH // 16)) + group
    bits = tl.load(of_row + _BITS * (WIDTH // 16), mask=group * 16 < channels, other=0)
    base_bits, more_bits = bits & 0xFF, bits >> 8
    low, high = _row_words(segment, tl.load(of_row + _BASE * (WIDTH // 16)), base_bits, t)
    # Bases are put above the place of their refinement.
    q0, q1 = _quad(low, high, base_bits, 0, more_bits), _quad(low, high, base_bits, 1, more_bits)
    q2, q3 = _quad(low, high, base_bits, 2, more_bits), _quad(low, high, base_bits, 3, more_bits)
    cells = (1 << more_bits).to(tl.float32)
    if REFINED:
        low, high = _row_words(segment, tl.load(of_row + _REFINEMENT * (WIDTH // 16)), more_bits, t)
        q0, q1 = q0 | _quad(low, high, more_bits, 0, 0), q1 | _quad(low, high, more_bits, 1, 0)
        q2, q3 = q2 | _quad(low, high, more_bits, 2, 0), q3 | _quad(low, high, more_bits, 3, 0)
        return q0, q1, q2, q3, tl.zeros_like(cells)
    else:
        return q0, q1, q2, q3, (cells - 1) * 0.5


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
def _scale_of(byte):
    """Bytes that hold the upper bits of a positive float16 -> float32."""
    return (byte.to(tl.int16) << 7).to(tl.float16, bitcast=True).to(tl.float32)
