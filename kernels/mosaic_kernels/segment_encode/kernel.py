"""Device code: rotated pages -> segments of planes, the same bytes as the reference.

Every operation is one that all devices round alike; products and sums must not be fused (the launch sees to that).
Divisions are the correctly rounded ones, and integers round to even by adding and taking away 1.5 * 2^23.
"""

import triton
import triton.language as tl

from mosaic_kernels import segment_table as table
from mosaic_kernels.segment_encode import exact, quantise

_SCALARS = tl.constexpr(table.SCALARS)
_KIND, _PLANES = tl.constexpr(table.KIND), tl.constexpr(table.PLANES)
_EXCEPTIONS = tl.constexpr(table.EXCEPTIONS)
_WORDS = tl.constexpr(table.WORDS)
_BASE, _REFINEMENT, _BITS = tl.constexpr(table.BASE), tl.constexpr(table.REFINEMENT), tl.constexpr(table.BITS)
_LEVELS = tl.constexpr(table.LEVELS)
_K_SCALES, _K_OFFSETS = tl.constexpr(table.K_SCALES), tl.constexpr(table.K_OFFSETS)
_K_CODED, _V_CODED = tl.constexpr(table.K_CODED), tl.constexpr(table.V_CODED)
_V_SCALES, _MEAN_V = tl.constexpr(table.V_SCALES), tl.constexpr(table.MEAN_V)
_MEAN_SCALE = tl.constexpr(table.MEAN_SCALE)
_INFINITE = tl.constexpr(quantise.INFINITE_SCALE)
_COVER_1, _COVER_2 = tl.constexpr(quantise.K_COVERS[1]), tl.constexpr(quantise.K_COVERS[2])
_TRIED_0, _TRIED_1, _TRIED_2 = (tl.constexpr(more) for more in quantise.V_TRIED)
_ERROR_UNITS = tl.constexpr(quantise.ERROR_UNITS)
_INPUT_BITS = tl.constexpr(exact.INPUT_BITS)
_SMALLEST_EXPONENT = tl.constexpr(exact.SMALLEST_EXPONENT)


@triton.jit
def encode_kernel(
    k_rot, v_rot, data, frame_bytes, numbers, starts, scalars, k_words, v_words, epoch, pages,
    HEADS: tl.constexpr, FORMATS: tl.constexpr, T: tl.constexpr,
    DK: tl.constexpr, K_DIM: tl.constexpr, DV: tl.constexpr, V_DIM: tl.constexpr,
):  # fmt: skip
    """One program: K or V of one page and head.

    k_rot, v_rot float32 [HEADS, pages, T, dim]; numbers int32 [HEADS, pages], formats of the segments. Those that are
    not of planes, or have exceptions, are left alone.
    """
    page, head = tl.program_id(0), tl.program_id(1)
    number = tl.load(numbers + head * pages + page)
    of_head = epoch * HEADS + head
    row = of_head * FORMATS + number
    kind = tl.load(scalars + row * _SCALARS + _KIND)
    kept = tl.load(scalars + row * _SCALARS + _EXCEPTIONS)
    if (kind != _PLANES) | (kept > 0):
        return
    segment = data + page.to(tl.int64) * frame_bytes + tl.load(starts + of_head)
    at = (head * pages + page).to(tl.int64) * T
    if tl.program_id(2) == 0:
        _encode_keys(k_rot + at * K_DIM, segment, scalars + row * _SCALARS, k_words, row, T, DK, K_DIM)
    else:
        _encode_values(v_rot + at * V_DIM, segment, scalars + row * _SCALARS, v_words, row, T, DV, V_DIM)


@triton.jit
def _encode_keys(source, segment, of_row, words, row, T: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr):
    t, c = tl.arange(0, T)[:, None], tl.arange(0, D)[None, :]
    y = tl.load(source + t * DIM + c, mask=c < DIM, other=0)
    width, last = _widths(words, row, c // 16, D)
    # Minima and maxima pass over NaN; its channel must not come out finite.
    unknown = tl.where(tl.max((y != y).to(tl.int32), 0) > 0, float("nan"), 0.0)[None, :]
    low, high = tl.min(y, 0)[None, :] + unknown, tl.max(y, 0)[None, :] + unknown
    cover = tl.where(width == 1, _COVER_1, tl.where(width == 2, _COVER_2, 1.0))
    scale = tl.div_rn((high * 0.5 - low * 0.5) * cover, tl.maximum(last, 1.0)) * 2
    scale = tl.where(width > 0, scale, 0.0).to(tl.float16)
    offset = low * 0.5 + high * 0.5 - scale.to(tl.float32) * (last * 0.5)
    offset = (tl.where(width > 0, offset, _mean(y, T)[None, :]) + 0.0).to(tl.float16)
    coded = tl.load(of_row + _K_CODED)
    scales = (segment + tl.load(of_row + _K_SCALES)).to(tl.pointer_type(tl.float16))
    offsets = (segment + tl.load(of_row + _K_OFFSETS)).to(tl.pointer_type(tl.float16))
    tl.store(scales + c, scale, mask=c < coded)
    tl.store(offsets + c, offset, mask=c < DIM)
    step = scale.to(tl.float32)
    codes = _nearest(tl.div_rn(y - offset.to(tl.float32), tl.where(step > 0, step, 1.0)), last)
    _put_planes(segment, words, row, codes.to(tl.int32), T, D)


@triton.jit
def _encode_values(source, segment, of_row, words, row, T: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr):
    t, c = tl.arange(0, T)[:, None], tl.arange(0, D)[None, :]
    y = tl.load(source + t * DIM + c, mask=c < DIM, other=0)
    coded = tl.load(of_row + _V_CODED)
    inside = c < coded
    _, last = _widths(words, row, c // 16, D)
    levels = tl.load(words + (row * (D // 16) + c // 16) * _WORDS + _LEVELS)
    steps = tl.where(inside, levels.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32), 1.0)
    # Infinite if a value is NaN, which maxima pass over.
    largest = tl.max(tl.where(inside, tl.where(y == y, tl.abs(y), float("inf")), 0.0), 1)[:, None]
    anchor = _scale_byte(tl.div_rn(largest, tl.full([T, 1], 3.0, tl.float32)), 64)
    byte = _tried(anchor, _TRIED_0)
    best = _scale_error(y, steps, last, inside, byte)
    for n in tl.static_range(1, 3):
        other = _tried(anchor, _TRIED_1 if n == 1 else _TRIED_2)
        error = _scale_error(y, steps, last, inside, other)
        byte, best = tl.where(error < best, other, byte), tl.where(error < best, error, best)
    codes = tl.where(inside, _nearest(_above(y, steps, last, byte), last), 0.0)
    tl.store(segment + tl.load(of_row + _V_SCALES) + t, byte.to(tl.uint8), mask=t < tl.where(coded > 0, T, 0))
    _put_planes(segment, words, row, codes.to(tl.int32), T, D)
    mean = _mean(y, T)[None, :]
    largest = tl.max(tl.abs(mean), 1)[:, None]
    mean_byte = _scale_byte(tl.div_rn(largest, tl.full([1, 1], 127.0, tl.float32)), 127)
    scale = _scale_of(mean_byte)
    units = _round(tl.div_rn(mean, tl.where(scale > 0, scale, 1.0)))
    units = tl.minimum(tl.maximum(units, -127.0), 127.0)
    means = (segment + tl.load(of_row + _MEAN_V)).to(tl.pointer_type(tl.int8))
    tl.store(means + c, units.to(tl.int8), mask=c < DIM)
    tl.store(segment + tl.load(of_row + _MEAN_SCALE) + tl.zeros([1, 1], tl.int32), mean_byte.to(tl.uint8))


@triton.jit
def _widths(words, row, group, D: tl.constexpr):
    """Bits of a group's codes, and the largest of them as float32."""
    bits = tl.load(words + (row * (D // 16) + group) * _WORDS + _BITS)
    width = (bits & 0xFF) + (bits >> 8)
    return width, ((1 << width) - 1).to(tl.float32)


@triton.jit
def _tried(anchor, more: tl.constexpr):
    """A scale byte near `anchor`; not finite stays so."""
    return tl.where(anchor < _INFINITE, tl.minimum(tl.maximum(anchor + more, 0), _INFINITE - 1), anchor)


@triton.jit
def _above(y, steps, last, byte):
    """Values in steps above the lowest code."""
    scale = _scale_of(byte)
    return tl.div_rn(y, steps * tl.where(scale > 0, scale, 1.0)) + last * 0.5


@triton.jit
def _scale_error(y, steps, last, inside, byte):
    """Squared error of a scale per token, float64 [T, 1]."""
    above = _above(y, steps, last, byte)
    units = _round((above - _nearest(above, last)) * _ERROR_UNITS)
    units = tl.where(inside & (tl.abs(units) < float("inf")), units, 0.0).to(tl.int32)
    wide = _scale_of(byte).to(tl.float64)
    return tl.sum(units * units, 1)[:, None].to(tl.float64) * (wide * wide)


@triton.jit
def _put_planes(segment, words, row, codes, T: tl.constexpr, D: tl.constexpr):
    """Codes int32 [T, D] into the planes of every group."""
    g = tl.arange(0, D // 16)[None, :]
    of_group = words + (row * (D // 16) + g) * _WORDS
    bits = tl.load(of_group + _BITS)
    base_bits, more_bits = bits & 0xFF, bits >> 8
    codes = tl.reshape(codes, [T, D // 16, 16])
    more = more_bits[:, :, None]
    _put_plane(segment, tl.load(of_group + _BASE), base_bits, codes >> more, T, D)
    below = codes & (1 << more) - 1
    _put_plane(segment, tl.load(of_group + _REFINEMENT), more_bits, below, T, D)


@triton.jit
def _put_plane(segment, plane, bits, fields, T: tl.constexpr, D: tl.constexpr):
    """fields int32 [T, groups, 16] of `bits` [1, groups] each into one plane of every group that has it."""
    t, channel = tl.arange(0, T)[:, None], tl.arange(0, 16)[None, None, :]
    b, quad = bits[:, :, None], channel // 4
    shift = channel % 4 * 8 + tl.where(b == 4, quad // 2 * 4, quad * b)
    second = (b == 4) & (quad % 2 == 1)
    # Fields do not overlap: a sum is a union.
    low = tl.sum(tl.where(second, 0, fields << shift), 2)
    high = tl.sum(tl.where(second, fields << shift, 0), 2)
    start, stride = plane & 0xFFFF, plane >> 16
    words = (segment + start + t * stride).to(tl.pointer_type(tl.int32))
    tl.store(words, low, mask=bits > 1)
    tl.store(words + 1, high, mask=bits == 4)
    # One bit: the odd token four places above the even one.
    pair = tl.reshape(low << tl.where(t % 2 == 1, 4, 0), [T // 2, 2, D // 16])
    rows = tl.arange(0, T // 2)[:, None]
    words = (segment + start + rows * stride).to(tl.pointer_type(tl.int32))
    tl.store(words, tl.sum(pair, 1), mask=bits == 1)


@triton.jit
def _mean(y, T: tl.constexpr):
    """exact.exact_mean of [T, D]: float32 [D], NaN if a value is not finite. T a power of two: only the end rounds."""
    largest = tl.max(tl.max(tl.where(y == y, tl.abs(y), float("inf")), 1), 0)
    exponent = (largest.to(tl.int32, bitcast=True) >> 23 & 0xFF) - 126
    exponent = tl.maximum(exponent, _SMALLEST_EXPONENT)
    exponent = tl.where(largest < float("inf"), exponent, 0)
    factor = (-exponent + _INPUT_BITS + 127 << 23).to(tl.float32, bitcast=True)
    unit = (exponent - _INPUT_BITS + 127 << 23).to(tl.float32, bitcast=True)
    integers = tl.where(largest < float("inf"), _round(y * factor), 0.0).to(tl.int32)
    mean = tl.sum(integers, 0).to(tl.float32) * (1.0 / T) * unit
    return tl.where(largest < float("inf"), mean, float("nan"))


@triton.jit
def _nearest(x, last):
    """Nearest code from 0 to `last`."""
    return _round(tl.minimum(tl.maximum(x, 0.0), last))


@triton.jit
def _round(x):
    """To the nearest integer, halves to even; beyond 2^22 as it is."""
    return tl.where(tl.abs(x) < 4194304.0, (x + 12582912.0) - 12582912.0, x)


@triton.jit
def _scale_byte(needed, more: tl.constexpr):
    """Upper bits of the float16, int32, after adding `more` to the lower ones; infinite if `needed` is not finite."""
    byte = needed.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) + more >> 7
    return tl.where(tl.abs(needed) < float("inf"), byte, _INFINITE)


@triton.jit
def _scale_of(byte):
    return (byte << 7).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
