"""Device code: rotated pages -> segments of planes, the same bytes as the reference."""

import triton
import triton.language as tl

from mosaic_kernels import segment_table as table
from mosaic_kernels.load_words import load_four
from mosaic_kernels.segment_encode import quantise
from mosaic_kernels.segment_encode.arithmetic import (
    INFINITE_BITS,
    INFINITE_SCALE,
    magnitude_bits,
    mean_of,
    mean_units,
    nearest,
    quotient,
    rounded,
    scale_byte,
    scale_of,
    with_inverse,
)
from mosaic_kernels.segment_encode.put_planes import four_codes, put_planes

_SCALARS = tl.constexpr(table.SCALARS)
_KIND, _PLANES = tl.constexpr(table.KIND), tl.constexpr(table.PLANES)
_EXCEPTIONS = tl.constexpr(table.EXCEPTIONS)
_WORDS = tl.constexpr(table.WORDS)
_K_SCALES, _K_OFFSETS = tl.constexpr(table.K_SCALES), tl.constexpr(table.K_OFFSETS)
_K_CODED, _V_CODED = tl.constexpr(table.K_CODED), tl.constexpr(table.V_CODED)
_V_SCALES, _MEAN_V = tl.constexpr(table.V_SCALES), tl.constexpr(table.MEAN_V)
_MEAN_SCALE = tl.constexpr(table.MEAN_SCALE)
_BITS = tl.constexpr(table.BITS)
_COVER_1, _COVER_2 = tl.constexpr(quantise.K_COVERS[1]), tl.constexpr(quantise.K_COVERS[2])
_TRIED_0, _TRIED_1, _TRIED_2 = (tl.constexpr(more) for more in quantise.V_TRIED)
_ERROR_UNITS = tl.constexpr(float(quantise.ERROR_UNITS))


# Compiled once for any number of pages: it takes seconds, in the middle of serving.
@triton.jit(do_not_specialize=["pages", "epoch"])
def encode_kernel(
    k_rot, v_rot, data, frame_bytes, numbers, starts, scalars, k_words, v_words, epoch, pages,
    HEADS: tl.constexpr, FORMATS: tl.constexpr, T: tl.constexpr,
    DK: tl.constexpr, K_DIM: tl.constexpr, DV: tl.constexpr, V_DIM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program: K or V of one page and head, read twice, TILE tokens at a time.

    k_rot, v_rot float32 [HEADS, pages, T, dim]; numbers int32 [HEADS, pages], formats of the segments. Those that are
    not of planes, or have exceptions, are left alone.
    """
    page, head = tl.program_id(0), tl.program_id(1)
    number = tl.load(numbers + head * pages + page)
    of_head = epoch * HEADS + head
    row = of_head * FORMATS + number
    of_row = scalars + row * _SCALARS
    if (tl.load(of_row + _KIND) != _PLANES) | (tl.load(of_row + _EXCEPTIONS) > 0):
        return
    segment = data + page.to(tl.int64) * frame_bytes + tl.load(starts + of_head)
    at = (head * pages + page).to(tl.int64) * T
    if tl.program_id(2) == 0:
        _encode_keys(k_rot + at * K_DIM, segment, of_row, k_words + row * (DK // 16) * _WORDS, T, TILE, DK, K_DIM)
    else:
        _encode_values(v_rot + at * V_DIM, segment, of_row, v_words + row * (DV // 16) * _WORDS, T, TILE, DV, V_DIM)


@triton.jit
def _encode_keys(source, segment, of_row, words, T: tl.constexpr, TILE: tl.constexpr, D: tl.constexpr,
                 DIM: tl.constexpr):  # fmt: skip
    # A thread has four channels of some tokens.
    t, c = tl.arange(0, TILE)[:, None], tl.arange(0, D)[None, :]
    at, there = source + t * DIM + c, c < DIM
    low, high = tl.full([TILE, D], float("inf"), tl.float32), tl.full([TILE, D], float("-inf"), tl.float32)
    largest = tl.zeros([TILE, D], tl.int32)
    for first in range(0, T, TILE):
        y = tl.load(at + first * DIM, mask=there, other=0)
        low, high = tl.minimum(low, y), tl.maximum(high, y)
        largest = tl.maximum(largest, magnitude_bits(y))
    # Minima and maxima pass over NaN; its channel must not come out finite.
    largest = tl.max(largest, 0)[None, :]
    unknown = tl.where(largest > INFINITE_BITS, float("nan"), 0.0)
    low, high = tl.min(low, 0)[None, :] + unknown, tl.max(high, 0)[None, :] + unknown
    bits = tl.load(words + c // 16 * _WORDS + _BITS)
    width = (bits & 0xFF) + (bits >> 8)
    last = ((1 << width) - 1).to(tl.float32)
    cover = tl.where(width == 1, _COVER_1, tl.where(width == 2, _COVER_2, 1.0))
    scale = tl.div_rn((high * 0.5 - low * 0.5) * cover, tl.maximum(last, 1.0)) * 2
    scale = tl.where(width > 0, scale, 0.0).to(tl.float16)
    offset = (low * 0.5 + high * 0.5 - scale.to(tl.float32) * (last * 0.5) + 0.0).to(tl.float16)
    coded = tl.load(of_row + _K_CODED)
    scales = (segment + tl.load(of_row + _K_SCALES)).to(tl.pointer_type(tl.float16))
    offsets = (segment + tl.load(of_row + _K_OFFSETS)).to(tl.pointer_type(tl.float16))
    tl.store(scales + c, scale, mask=c < coded)
    tl.store(offsets + c, offset, mask=c < coded)
    if coded < DIM:
        of_all = tl.max(largest)
        factor, unit = mean_units(of_all)
        total = tl.zeros([TILE, D], tl.int32)
        for first in range(0, T, TILE):
            y = tl.load(at + first * DIM, mask=there & (c >= coded), other=0)
            total += rounded(y, factor)
        mean = mean_of(tl.sum(total, 0)[None, :], unit, of_all, T)
        tl.store(offsets + c, (mean + 0.0).to(tl.float16), mask=there & (c >= coded))
    divisor, inverse = with_inverse(scale.to(tl.float32))
    below = offset.to(tl.float32)
    # An offset beyond float16: what is left of a value is infinite.
    endless = (tl.abs(below) == float("inf")) & (divisor > 0)
    least = tl.where(endless & (below < 0), last, 0.0)
    below, inverse = tl.where(endless, 0.0, below), tl.where(endless, 0.0, inverse)
    divisor = tl.where(endless, 0.0, divisor)
    g = tl.arange(0, D // 16)[:, None]
    base, refinement, both, levels = load_four(words + g * _WORDS)
    for first in range(0, T, TILE):
        y = tl.load(at + first * DIM, mask=there, other=0)
        found, codes = nearest(quotient(y - below, divisor, inverse), least, last)
        quads = four_codes(tl.reshape(codes, [TILE, D // 4, 4]), 2)
        even, odd = tl.split(tl.permute(tl.reshape(quads, [TILE, D // 16, 2, 2]), [1, 0, 2, 3]))
        w0, w2 = tl.split(even)
        w1, w3 = tl.split(odd)
        put_planes(segment, (base, refinement, both), first, w0, w1, w2, w3, TILE, D // 16)


@triton.jit
def _encode_values(source, segment, of_row, words, T: tl.constexpr, TILE: tl.constexpr, D: tl.constexpr,
                   DIM: tl.constexpr):  # fmt: skip
    # A thread has all channels of a group, of some tokens.
    g, t = tl.arange(0, D // 16)[:, None], tl.arange(0, TILE)[None, :]
    at, there = source + t * DIM + g * 16, g * 16 < DIM
    largest = tl.zeros([D // 16, TILE], tl.int32)
    for first in range(0, T, TILE):
        y = _load_groups(at + first * DIM, there)
        largest = tl.maximum(largest, _largest(y))
    largest = tl.max(largest)
    factor, unit = mean_units(largest)
    coded = tl.load(of_row + _V_CODED)
    inside = g * 16 < coded
    base, refinement, both, levels = load_four(words + g * _WORDS)
    last = ((1 << (both & 0xFF) + (both >> 8)) - 1).to(tl.float32)
    steps = tl.where(inside, levels.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32), 1.0)
    total = tl.zeros([D // 16, TILE, 4, 2, 2], tl.int32)
    scales = segment + tl.load(of_row + _V_SCALES)
    for first in range(0, T, TILE):
        y = _load_groups(at + first * DIM, there)
        total += rounded(y, factor)
        highest = tl.max(tl.where(inside, _largest(y), 0), 0)[None, :].to(tl.float32, bitcast=True)
        anchor = scale_byte(tl.div_rn(highest, tl.full([1, TILE], 3.0, tl.float32)), 64)
        byte = _tried(anchor, _TRIED_0)
        codes, best = _codes(y, steps, last, inside, byte)
        for n in tl.static_range(1, 3):
            other = _tried(anchor, _TRIED_1 if n == 1 else _TRIED_2)
            others, error = _codes(y, steps, last, inside, other)
            better = error < best
            byte, best = tl.where(better, other, byte), tl.where(better, error, best)
            codes = tl.where(better[:, :, None, None], others, codes)
        tl.store(scales + first + t, byte.to(tl.uint8), mask=t < tl.where(coded > 0, TILE, 0))
        early, late = tl.split(codes)
        w0, w1 = tl.split(early)
        w2, w3 = tl.split(late)
        put_planes(segment, (base, refinement, both), first, w0, w1, w2, w3, TILE, D // 16)
    mean = mean_of(tl.sum(total, 1)[:, None], unit, largest, T)
    _put_mean(mean, segment, of_row, D, DIM)


@triton.jit
def _put_mean(mean, segment, of_row, D: tl.constexpr, DIM: tl.constexpr):
    """mean [groups, 1, 4, 2, 2] of `_load_groups`."""
    mean = tl.reshape(tl.permute(mean, [1, 0, 4, 3, 2]), [1, D])
    c = tl.arange(0, D)[None, :]
    largest = tl.max(tl.abs(mean), 1)[:, None]
    byte = scale_byte(tl.div_rn(largest, tl.full([1, 1], 127.0, tl.float32)), 127)
    scale = scale_of(byte)
    units = tl.div_rn(mean, tl.where(scale > 0, scale, 1.0))
    nearest_mean, units = nearest(units, -127.0, 127.0)
    means = (segment + tl.load(of_row + _MEAN_V)).to(tl.pointer_type(tl.int8))
    tl.store(means + c, units.to(tl.int8), mask=c < DIM)
    tl.store(segment + tl.load(of_row + _MEAN_SCALE) + tl.zeros([1, 1], tl.int32), byte.to(tl.uint8))


@triton.jit
def _load_groups(at, there):
    """16 float32 from each pointer [M, N], [M, N, 4, 2, 2]: channel i + 4 j + 8 k at [.., i, j, k]."""
    at, there = at[:, :, None] + tl.arange(0, 4)[None, None, :], there[:, :, None]
    a, b = tl.load(at, mask=there, other=0), tl.load(at + 4, mask=there, other=0)
    c, d = tl.load(at + 8, mask=there, other=0), tl.load(at + 12, mask=there, other=0)
    return tl.join(tl.join(a, b), tl.join(c, d))


@triton.jit
def _largest(y):
    """Bits of the largest magnitude of every group, int32 [M, N]."""
    return tl.max(tl.max(tl.max(magnitude_bits(y), 4), 3), 2)


@triton.jit
def _tried(anchor, more: tl.constexpr):
    """A scale byte near `anchor`; not finite stays so."""
    return tl.where(anchor < INFINITE_SCALE, tl.minimum(tl.maximum(anchor + more, 0), INFINITE_SCALE - 1), anchor)


@triton.jit
def _codes(y, steps, last, inside, byte):
    """Codes of a scale per token, int32, 0 where nothing is coded, and their squared error, float64 [1, N]."""
    scale = scale_of(byte)
    divisor, inverse = with_inverse(steps * tl.where(scale > 0, scale, 1.0))
    divisor, inverse = divisor[:, :, None, None, None], inverse[:, :, None, None, None]
    end = last[:, :, None, None, None]
    above = quotient(y, divisor, inverse) + end * 0.5
    found, codes = nearest(above, 0.0, end)
    units = rounded(above - found, _ERROR_UNITS)
    squares = tl.sum(tl.sum(tl.sum(units * units, 4), 3), 2)
    wide = scale.to(tl.float64)
    codes = four_codes(tl.permute(codes, [0, 1, 3, 4, 2]), 4)
    return codes, tl.sum(tl.where(inside, squares, 0), 0)[None, :].to(tl.float64) * (wide * wide)
