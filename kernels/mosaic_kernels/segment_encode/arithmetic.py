"""Device code: rounding, quotients and scale bytes as the reference has them, in few instructions.

Every operation is one that all devices round alike; products and sums must not be fused (launches see to that).
"""

import triton
import triton.language as tl

from mosaic_kernels.segment_encode import exact, quantise
from mosaic_kernels.unpack_bytes import INTERPRETED

INFINITE_BITS = tl.constexpr(0x7F800000)
"""Of float32; those of NaN are above."""
INFINITE_SCALE = tl.constexpr(quantise.INFINITE_SCALE)
# 1.5 * 2^23: what is added to it is rounded to an integer, halves to even, which are then its lower bits.
_ROUNDER, _ROUNDER_BITS = tl.constexpr(12582912.0), tl.constexpr(0x4B400000)
_INPUT_BITS = tl.constexpr(exact.INPUT_BITS)
_SMALLEST_EXPONENT = tl.constexpr(exact.SMALLEST_EXPONENT)


@triton.jit
def rounded(x, scale):
    """x * scale to the nearest integer, halves to even: int32. scale is a power of two, the product below 2^22; what is
    not finite gives any integer."""
    return tl.fma(x, scale, _ROUNDER).to(tl.int32, bitcast=True) - _ROUNDER_BITS


@triton.jit
def nearest(x, least, last):
    """The nearest integer from `least` to `last`, which are below 2^22: float32, and int32. Of NaN: `least`."""
    moved = tl.minimum(tl.maximum(x, least), last) + _ROUNDER
    return moved - _ROUNDER, moved.to(tl.int32, bitcast=True) - _ROUNDER_BITS


@triton.jit
def quotient(x, divisor, inverse):
    """x / divisor, correctly rounded; 0 if the divisor is 0. NaN if x is not finite.

    Args:
        divisor, inverse: of `with_inverse`.
    """
    if INTERPRETED:
        return tl.where(divisor > 0, tl.div_rn(x, tl.where(divisor > 0, divisor, 1.0)), x * 0)
    # The first product is off by 5 units in the last place at most, what is left of x then is exact, and the sum before
    # its rounding is off by 2^-19 units. A quotient by so short a divisor is never where rounding changes, but 2^-12
    # units away at least.
    first = x * inverse
    return tl.fma(tl.fma(-first, divisor, x), inverse, first)


@triton.jit
def with_inverse(divisor):
    """Positive float32 of at most 11 significant bits -> what to give `quotient`. By 0 as by 1, by infinity as by 0."""
    divisor = tl.where(divisor > 0, divisor, 1.0)
    finite = divisor < float("inf")
    return tl.where(finite, divisor, 0.0), tl.where(finite, 1.0 / divisor, 0.0)


@triton.jit
def magnitude_bits(x):
    """Bits of |x|, int32: they are ordered as the magnitudes are, NaN above all."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def mean_units(largest_bits):
    """exact.to_integers of what has this largest magnitude: factor and unit, float32."""
    exponent = tl.maximum((largest_bits >> 23) - 126, _SMALLEST_EXPONENT)
    exponent = tl.where(largest_bits < INFINITE_BITS, exponent, 0)
    factor = (-exponent + _INPUT_BITS + 127 << 23).to(tl.float32, bitcast=True)
    return factor, (exponent - _INPUT_BITS + 127 << 23).to(tl.float32, bitcast=True)


@triton.jit
def mean_of(total, unit, largest_bits, T: tl.constexpr):
    """exact.exact_mean from the sum of T integers; NaN if a value is not finite. T a power of two: only the end
    rounds."""
    return tl.where(largest_bits < INFINITE_BITS, total.to(tl.float32) * (1.0 / T) * unit, float("nan"))


@triton.jit
def scale_byte(needed, more: tl.constexpr):
    """Upper bits of the float16, int32, after adding `more` to the lower ones; infinite if `needed` is not finite."""
    byte = needed.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) + more >> 7
    return tl.where(tl.abs(needed) < float("inf"), byte, INFINITE_SCALE)


@triton.jit
def scale_of(byte):
    return (byte << 7).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
