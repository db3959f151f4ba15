"""Device code that reads K or V of some tokens, of segments of any format (segment_table.py).

A tile is returned in factors, so that tensor cores may multiply small integers that float16 holds exactly:

    value[t, c] = codes[t, c] * token_scale[t] * channel_scale[c] + offset[c]

All tensors have two dimensions, tokens and channels. `segment` is one pointer or, where every token has a segment of
its own, [T, 1] pointers; `t` is int32 [T, 1], the tokens in their segments. Tokens kept as exceptions have arbitrary
codes; `exceptions` and its kin say which they are.
"""

import triton
import triton.language as tl

from mosaic_kernels import segment_table

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


@triton.jit
def find_row(segment, scalars, first_row, FORMATS: tl.constexpr):
    """Row of a segment's format, and its kind; the frame was never encoded: INVALID."""
    number = tl.load(segment).to(tl.int32)
    row = first_row + tl.minimum(number, FORMATS - 1)
    kind = tl.load(scalars + row * _SCALARS + _KIND)
    return row, tl.where(number < FORMATS, kind, INVALID)


@triton.jit
def kind_of(scalars, row):
    """Kind of a row."""
    return tl.load(scalars + row * _SCALARS + _KIND)


@triton.jit
def load_keys(
    segment, scalars, words, row, kind, t, channels,
    D: tl.constexpr, DIM: tl.constexpr, REFINED: tl.constexpr, ANY_TOPK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """K of tokens of one segment: codes [T, D], token_scale [T, 1], channel_scale and offset [1, D], float32.

    The first `channels` of DIM, the others 0. WIDTH is DIM filled up to a power of two, D one of at least `channels`.
    """
    # NaN marks what was never encoded: wrong data must not pass for an answer.
    token_scale = tl.zeros_like(t).to(tl.float32) + tl.where(kind == INVALID, float("nan"), 1.0)
    codes = tl.zeros([t.shape[0], D], tl.float32)
    channel_scale = tl.zeros([1, D], tl.float32)
    offset = tl.zeros([1, D], tl.float32)
    if kind == PLANES:
        codes, channel_scale, offset = plane_keys(segment, scalars, words, row, t, channels, D, REFINED, WIDTH)
    if ANY_TOPK:
        if kind == TOPK:
            codes, token_scale = topk_codes(segment, scalars, row, t, channels, 0, D, DIM)
            channel_scale = tl.full([1, D], 1.0, tl.float32)
    return codes, token_scale, channel_scale, offset


@triton.jit
def load_values(
    segment, scalars, words, levels, row, kind, t, D: tl.constexpr, DIM: tl.constexpr, ANY_TOPK: tl.constexpr
):
    """V of tokens of one segment, as `load_keys`."""
    token_scale = tl.zeros_like(t).to(tl.float32) + tl.where(kind == INVALID, float("nan"), 1.0)
    codes = tl.zeros([t.shape[0], D], tl.float32)
    channel_scale = tl.full([1, D], 1.0, tl.float32)
    offset = tl.zeros([1, D], tl.float32)
    if kind == PLANES:
        codes, token_scale, channel_scale, offset = plane_values(segment, scalars, words, levels, row, t, D, DIM)
    if ANY_TOPK:
        if kind == TOPK:
            codes, token_scale = topk_codes(segment, scalars, row, t, DIM, 1, D, DIM)
    return codes, token_scale, channel_scale, offset


@triton.jit
def plane_keys(segment, scalars, words, row, t, channels, D: tl.constexpr, REFINED: tl.constexpr, WIDTH: tl.constexpr):
    """K of planes: codes, channel_scale, offset."""
    c = tl.arange(0, D)[None, :]
    of_row = scalars + row * _SCALARS
    coded = tl.minimum(tl.load(of_row + _K_CODED), channels)
    scales = (segment + tl.load(of_row + _K_SCALES)).to(tl.pointer_type(tl.float16))
    offsets = (segment + tl.load(of_row + _K_OFFSETS)).to(tl.pointer_type(tl.float16))
    codes = _plane_codes(segment, words, row, t, channels, REFINED, D, WIDTH)
    channel_scale = tl.load(scales + c, mask=c < coded, other=0).to(tl.float32)
    return codes, channel_scale, tl.load(offsets + c, mask=c < channels, other=0).to(tl.float32)


@triton.jit
def plane_values(segment, scalars, words, levels, row, t, D: tl.constexpr, DIM: tl.constexpr):
    """V of planes: codes, token_scale, channel_scale, offset."""
    c = tl.arange(0, D)[None, :]
    of_row, of_levels = scalars + row * _SCALARS, levels + row * (2 * D) + c
    coded, scales_at = tl.load(of_row + _V_CODED), tl.load(of_row + _V_SCALES)
    # Half-integers below 128: float16 holds them.
    codes = _plane_codes(segment, words, row, t, DIM, True, D, D) - tl.load(of_levels)
    scale = _scale_of(tl.load(segment + scales_at + t, mask=t < tl.where(coded > 0, 256, 0), other=0))
    return codes, scale, tl.load(of_levels + D), tl.where(c < coded, 0.0, mean_values(segment, scalars, row, D, DIM))


@triton.jit
def topk_codes(segment, scalars, row, t, channels, PART: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr):
    """K (PART 0) or V (1) of top-k: codes, token_scale."""
    of_row = scalars + row * _SCALARS
    keep, scales_at = tl.load(of_row + _TOPK_KEEP[PART]), tl.load(of_row + _TOPK_SCALES[PART])
    bitmap_at, values_at = tl.load(of_row + _TOPK_BITMAP[PART]), tl.load(of_row + _TOPK_VALUES[PART])
    c = tl.arange(0, D)[None, :]
    kept = tl.load(segment + bitmap_at + t * (DIM // 8) + c // 8, mask=c < channels, other=0).to(tl.int32) >> c % 8 & 1
    # The n-th set bit of a token has the n-th value.
    which = tl.cumsum(kept, 1) - 1
    values = (segment + values_at).to(tl.pointer_type(tl.int8))
    codes = tl.load(values + t * keep + which, mask=kept == 1, other=0)
    scales = (segment + scales_at).to(tl.pointer_type(tl.float16))
    return codes.to(tl.float32), tl.load(scales + t).to(tl.float32)


@triton.jit
def mean_values(segment, scalars, row, D: tl.constexpr, DIM: tl.constexpr):
    """Mean V of segments of planes, float32 [1 or T, D]."""
    c = tl.arange(0, D)[None, :]
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
    """The first `channels` of K of exception `e`, float32 [1 or T, D]."""
    c = tl.arange(0, D)[None, :]
    at = (segment + tl.load(scalars + row * _SCALARS + _EXCEPTION_K)).to(tl.pointer_type(tl.float16))
    return tl.load(at + e * DIM + c, mask=c < channels, other=0).to(tl.float32)


@triton.jit
def exception_value(segment, scalars, row, e, D: tl.constexpr, DIM: tl.constexpr):
    """V of exception `e`, float32 [1 or T, D]."""
    c = tl.arange(0, D)[None, :]
    at = (segment + tl.load(scalars + row * _SCALARS + _EXCEPTION_V)).to(tl.pointer_type(tl.float16))
    return tl.load(at + e * DIM + c, mask=c < DIM, other=0).to(tl.float32)


@triton.jit
def _plane_codes(segment, words, row, t, channels, REFINED: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):
    """Codes, float32 [T, D]; without refinement, the middle of those that share a base."""
    c = tl.arange(0, D)[None, :]
    of_row = words + row * (_WORDS * WIDTH) + c
    base = tl.load(of_row + _BASE * WIDTH)
    bits = tl.load(of_row + _BITS * WIDTH, mask=c < channels, other=0)
    base_bits, more_bits = bits >> 4 & 15, bits >> 12
    at = (base & 0xFFFF) + t * (base >> 16)
    codes = tl.load(segment + at, mask=base_bits > 0, other=0).to(tl.int32)
    codes = codes >> (bits & 15) & (1 << base_bits) - 1
    if REFINED:
        more = tl.load(of_row + _REFINEMENT * WIDTH)
        at = (more & 0xFFFF) + t * (more >> 16)
        low = tl.load(segment + at, mask=more_bits > 0, other=0).to(tl.int32)
        return (codes << more_bits | low >> (bits >> 8 & 15) & (1 << more_bits) - 1).to(tl.float32)
    cells = (1 << more_bits).to(tl.float32)
    return codes.to(tl.float32) * cells + (cells - 1) * 0.5


@triton.jit
def _scale_of(byte):
    """Bytes that hold the upper bits of a positive float16 -> float32."""
    return (byte.to(tl.int16) << 7).to(tl.float16, bitcast=True).to(tl.float32)
