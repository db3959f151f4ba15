"""Device code: pages as written -> rotated pages, the same as the reference on every device.

Both factors are integers; as digits of one signed byte their products are sums of integers that tensor cores compute
exactly. What is left is one rounding, of a sum of at most 51 bits to float32.
"""

import triton
import triton.language as tl

from mosaic_kernels.segment_encode import exact

_INPUT_BITS = tl.constexpr(exact.INPUT_BITS)
_SMALLEST_EXPONENT = tl.constexpr(exact.SMALLEST_EXPONENT)
_FEW = tl.constexpr(16)
"""Channels of the result at a time where speed does not matter: for fewer registers."""


# Compiled once for any number of pages: it takes seconds, in the middle of serving.
@triton.jit(do_not_specialize=["pages"])
def rotate_kernel(
    x, digits, exponents, out, pages, page_stride, token_stride, head_stride, channel_stride,
    DIGITS: tl.constexpr, T: tl.constexpr, PAGES: tl.constexpr,
    D: tl.constexpr, DIM: tl.constexpr, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    """One program: PAGES pages of one head. D and INPUTS are DIM filled up; OUTPUTS channels at a time."""
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * (PAGES * T) + tl.arange(0, PAGES * T)
    inside = row < pages * T
    source = x + head * head_stride + (row // T).to(tl.int64) * page_stride + (row % T).to(tl.int64) * token_stride
    c = tl.arange(0, INPUTS)[None, :].to(tl.int64)
    y = tl.load(source[:, None] + c * channel_stride, mask=inside[:, None] & (c < DIM), other=0).to(tl.float32)
    # Maxima pass over NaN; it counts as infinity.
    largest = tl.max(tl.reshape(tl.max(tl.where(y == y, tl.abs(y), float("inf")), 1), [PAGES, T]), 1)
    exponent = tl.maximum((largest.to(tl.int32, bitcast=True) >> 23) - 126, _SMALLEST_EXPONENT)
    exponent = tl.where((largest > 0) & (largest < float("inf")), exponent, 0)
    exponent = tl.reshape(tl.broadcast_to(exponent[:, None], [PAGES, T]), [PAGES * T])
    # What 1 is worth in the product.
    unit = exponent - _INPUT_BITS + tl.load(exponents + head)
    digits += head * (DIGITS * D * INPUTS)
    out += (head * pages * T + row)[:, None] * DIM
    if (tl.max(largest, 0) < float("inf")) & (tl.min(unit, 0) >= -126) & (tl.max(unit, 0) <= 127):
        # Adding 1.5 * 2^23 rounds to integers, halves to even, which are then the lower bits.
        scaled = y * _power(-exponent + _INPUT_BITS)[:, None] + 12582912.0
        integers = scaled.to(tl.int32, bitcast=True) - 0x4B400000
        low = integers.to(tl.int8)
        middle = (integers + 0x80 >> 8).to(tl.int8)
        high = (integers + 0x8080 >> 16).to(tl.int8)
        for first in range(0, D, OUTPUTS):
            n = first + tl.arange(0, OUTPUTS)
            total = _product(low, middle, high, digits + first * INPUTS, DIGITS, PAGES * T, D, INPUTS, OUTPUTS)
            # Rounded once: times a power of two, a number of float32 stays one, since none becomes denormal.
            result = total.to(tl.float32) * _power(unit)[:, None]
            tl.store(out + n[None, :], result, mask=inside[:, None] & (n < DIM)[None, :])
    else:
        for first in range(0, D, _FEW):
            n = first + tl.arange(0, _FEW)
            total = _product_of_any(
                source, channel_stride, inside, exponent, digits + first * INPUTS,
                DIGITS, PAGES * T, D, DIM, INPUTS, _FEW,
            )  # fmt: skip
            result = (total * _power_64(unit)[:, None]).to(tl.float32)
            tl.store(out + n[None, :], result, mask=inside[:, None] & (n < DIM)[None, :])


@triton.jit
def _product(
    low, middle, high, digits, DIGITS: tl.constexpr,
    ROWS: tl.constexpr, D: tl.constexpr, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    """Exact product of integers of at most 2^20 (three int8 [ROWS, INPUTS]) and OUTPUTS channels: int64."""
    at = tl.arange(0, OUTPUTS)[None, :] * INPUTS + tl.arange(0, INPUTS)[:, None]
    b0 = tl.load(digits + at)
    b1 = tl.load(digits + D * INPUTS + at)
    b2 = tl.load(digits + 2 * D * INPUTS + at)
    # Digits are at most 2^7, the highest of an input 2^4 and of four of a basis 1; 2^8 channels are summed. So a sum of
    # products of one weight is below 2^24, and `top` below 2^31.
    top = tl.dot(high, b2, out_dtype=tl.int32)
    if DIGITS == 4:
        b3 = tl.load(digits + 3 * D * INPUTS + at)
        top += tl.dot(middle, b3, out_dtype=tl.int32) + tl.dot(high, b3, out_dtype=tl.int32) * 256
    next = tl.dot(high, b1, out_dtype=tl.int32)
    next = tl.dot(middle, b2, next, out_dtype=tl.int32)
    if DIGITS == 4:
        next = tl.dot(low, b3, next, out_dtype=tl.int32)
    top = top * 256 + next
    next = tl.dot(high, b0, out_dtype=tl.int32)
    next = tl.dot(middle, b1, next, out_dtype=tl.int32)
    next = tl.dot(low, b2, next, out_dtype=tl.int32)
    total = top.to(tl.int64) * 256 + next
    next = tl.dot(middle, b0, out_dtype=tl.int32)
    next = tl.dot(low, b1, next, out_dtype=tl.int32)
    total = total * 256 + next
    return total * 256 + tl.dot(low, b0, out_dtype=tl.int32)


@triton.jit
def _product_of_any(
    source, channel_stride, inside, exponent, digits, DIGITS: tl.constexpr,
    ROWS: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    """The same in float64: exact for finite pages, and of others what the reference makes of them."""
    total = tl.zeros([ROWS, OUTPUTS], tl.float64)
    for c in range(DIM):
        y = tl.load(source + c * channel_stride, mask=inside, other=0).to(tl.float32)
        scaled = (y * _power(-exponent + _INPUT_BITS)).to(tl.float64)
        # To the nearest integer, halves to even; beyond 2^51 float32 has no others.
        integers = tl.where(tl.abs(scaled) < 1e15, (scaled + 6755399441055744.0) - 6755399441055744.0, scaled)
        at = digits + tl.arange(0, OUTPUTS) * INPUTS + c
        basis = tl.zeros([OUTPUTS], tl.int32)
        for i in tl.static_range(DIGITS):
            basis += tl.load(at + i * D * INPUTS).to(tl.int32) << 8 * i
        total += integers[:, None] * basis.to(tl.float64)[None, :]
    return total


@triton.jit
def _power(exponent):
    """2^exponent, a normal float32."""
    return (exponent + 127 << 23).to(tl.float32, bitcast=True)


@triton.jit
def _power_64(exponent):
    return (exponent.to(tl.int64) + 1023 << 52).to(tl.float64, bitcast=True)
