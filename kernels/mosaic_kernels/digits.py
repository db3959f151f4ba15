"""Device code: numbers as two signed bytes each, so that tensor cores multiply them with codes in integers, exactly.

A number is an integer of 16 bits in units of 1 / MOST of the largest of its kind: 256 times its first digit plus its
second. Products with both stand side by side, and are added up likewise. As float16, numbers would have 11 bits, and
codes would have to become float16, too.
"""

import triton
import triton.language as tl

from mosaic_kernels import segment_table
from mosaic_kernels.load_bytes import BYTE_WORDS, SECOND, key_channel
from mosaic_kernels.load_words import load_four, load_two
from mosaic_kernels.unpack_bytes import INTERPRETED

MOST = tl.constexpr(32512.0)
"""127 * 256: the first digit is then at most 127, after rounding, too."""
_NONE = tl.constexpr(1e-30)
# Adding 1.5 * 2^23 leaves the integer in the lower bits; 128 more, and its second digit is a byte less 128.
_ROUND = tl.constexpr(12582912.0 + 128.0)
_SCALARS = tl.constexpr(segment_table.SCALARS)
_DIGITS = tl.constexpr(
    """{
    .reg .b32 a, b;
    prmt.b32 a, $2, $3, 0x0051;
    prmt.b32 b, $4, $5, 0x0051;
    prmt.b32 $0, a, b, 0x5410;
    prmt.b32 a, $2, $3, 0x0040;
    prmt.b32 b, $4, $5, 0x0040;
    prmt.b32 a, a, b, 0x5410;
    xor.b32 $1, a, 0x80808080;
    }"""
)


@triton.jit
def to_digits(x, inverse):
    """float32 numbers, of magnitudes whose largest has MOST / it as `inverse`: two int8, and the rounded number, in
    units."""
    rounded = x * inverse + _ROUND
    if INTERPRETED:
        n = rounded.to(tl.int32, bitcast=True)
        first, second = (n >> 8 & 0xFF).to(tl.uint8).to(tl.int8, bitcast=True), ((n & 0xFF) - 128).to(tl.int8)
    else:
        first, second = tl.inline_asm_elementwise(
            _DIGITS, "=&r,=r,r,r,r,r", [rounded], dtype=(tl.int8, tl.int8), is_pure=True, pack=4
        )
    return first, second, rounded - _ROUND


@triton.jit
def inverse_of(most):
    """MOST / most; of nothing but zeros, anything."""
    return 1.0 / tl.maximum(most, _NONE) * MOST


@triton.jit
def from_digits(products, N: tl.constexpr, R: tl.constexpr):
    """Sums of products [N, 2 R] with digits side by side: float32 [N, R], in units."""
    first, second = tl.split(tl.reshape(products, [N, R, 2]))
    return (first * 256 + second).to(tl.float32)


@triton.jit
def load_query(q, r, factor, channels, CHUNK: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr):
    """Channels of a chunk of 64 of queries, times a factor: eight float32 [8, R], channel i of every eight in the i-th.

    q: pointer to float32 [GROUP, DIM]; channels from `channels` on and rows beyond GROUP are 0.
    """
    first = key_channel(CHUNK, tl.arange(0, 8))[:, None]
    at, there = q + r[None, :] * DIM + first, (r < GROUP)[None, :] & (first < channels)
    return (
        tl.load(at, mask=there, other=0) * factor,
        tl.load(at + 1, mask=there, other=0) * factor,
        tl.load(at + 2, mask=there, other=0) * factor,
        tl.load(at + 3, mask=there, other=0) * factor,
        tl.load(at + 4, mask=there, other=0) * factor,
        tl.load(at + 5, mask=there, other=0) * factor,
        tl.load(at + 6, mask=there, other=0) * factor,
        tl.load(at + 7, mask=there, other=0) * factor,
    )


@triton.jit
def scale_query(
    query, segment, scalars, words, row, channels, CHUNK: tl.constexpr, REFINED: tl.constexpr, WIDTH: tl.constexpr
):
    """A chunk of queries in the scale of a page's bytes of K: float32 [8, R, 8]; the largest magnitudes [8, R], and
    parts [8, R] of what has to be added to products with the bytes.

    query: as of `load_query`; segment, row: [1, 1].
    """
    R: tl.constexpr = query[0].shape[1]
    first = tl.broadcast_to(key_channel(CHUNK, tl.arange(0, 8))[:, None], [8, R])
    _, coded, scales_at, offsets_at = load_four(scalars + row * _SCALARS)
    there = first < channels
    scales = (segment + scales_at).to(tl.pointer_type(tl.uint64)) + first // 4
    offsets = (segment + offsets_at).to(tl.pointer_type(tl.uint64)) + first // 4
    s0, s1 = load_two(scales, there & (first < coded))
    o0, o1 = load_two(offsets, there)
    _, _, levels, scan = load_four(words + (row * (WIDTH // 16) + first // 16) * BYTE_WORDS + SECOND)
    f, z = half_of(levels, 0), half_of(levels if REFINED else scan, 1)
    a, most_a, rest_a = _scale_four(query[0], query[1], query[2], query[3], s0, o0, f, z)
    b, most_b, rest_b = _scale_four(query[4], query[5], query[6], query[7], s1, o1, f, z)
    # [8, R, channel / 2 % 2, channel % 2, channel / 4]
    joined = tl.reshape(tl.permute(tl.join(a, b), 0, 1, 4, 2, 3), [8, R, 8])
    return joined, tl.maximum(most_a, most_b), rest_a + rest_b


@triton.jit
def query_digits(scaled, inverse):
    """`scale_query` in units of `inverse` [R]: int8 [64, 2 R], channels as `load_bytes.key_channel`."""
    R: tl.constexpr = scaled.shape[1]
    first, second, _ = to_digits(scaled, inverse[None, :, None])
    return tl.reshape(tl.permute(tl.join(first, second), 0, 2, 1, 3), [64, 2 * R])


@triton.jit
def half_of(word, N: tl.constexpr):
    """The N-th float16 of words, as float32."""
    return (word >> 16 * N & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _scale_four(q0, q1, q2, q3, scales, offsets, f, z):
    s0, s1, s2, s3 = half_of(scales, 0), half_of(scales, 1), half_of(scales, 2), half_of(scales, 3)
    rest = q0 * (half_of(offsets, 0) + s0 * z) + q1 * (half_of(offsets, 1) + s1 * z)
    rest += q2 * (half_of(offsets, 2) + s2 * z) + q3 * (half_of(offsets, 3) + s3 * z)
    p0, p1, p2, p3 = q0 * (s0 * f), q1 * (s1 * f), q2 * (s2 * f), q3 * (s3 * f)
    most = tl.maximum(tl.maximum(tl.abs(p0), tl.abs(p1)), tl.maximum(tl.abs(p2), tl.abs(p3)))
    return tl.join(tl.join(p0, p2), tl.join(p1, p3)), most, rest
