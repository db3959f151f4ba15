"""Device code: the four bytes of a word as float16, or as values that are affine in them.

0x64 above a byte is the float16 1024 + byte: no conversion is needed. On a device two bytes are worked on at a time,
which Triton's own operations would take one by one; the interpreter takes the plain form.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

_BYTES = tl.constexpr(
    """{
    .reg .b32 a, b;
    prmt.b32 a, $4, 0x64646464, 0x4140;
    prmt.b32 b, $4, 0x64646464, 0x4342;
    sub.f16x2 a, a, $5;
    sub.f16x2 b, b, $5;
    mov.b32 {$0, $1}, a;
    mov.b32 {$2, $3}, b;
    }"""
)
_AFFINE = tl.constexpr(
    """{
    .reg .b32 a, b, fa, fb, ca, cb;
    mov.b64 {fa, fb}, $6;
    mov.b64 {ca, cb}, $7;
    prmt.b32 a, $4, 0x64646464, 0x4140;
    prmt.b32 b, $4, 0x64646464, 0x4342;
    sub.f16x2 a, a, $5;
    sub.f16x2 b, b, $5;
    fma.rn.f16x2 a, a, fa, ca;
    fma.rn.f16x2 b, b, fb, cb;
    mov.b32 {$0, $1}, a;
    mov.b32 {$2, $3}, b;
    }"""
)


@triton.jit
def unpack_bytes(word, more):
    """uint32 [G, T] -> float16 [G, T, 2, 2], byte 2 i + j at [.., i, j], each plus `more` float32 [1 or G, 1 or T],
    halves of at most 8 or -128."""
    less = (1024.0 - more).to(tl.float16)
    if INTERPRETED:
        a, b, c, d = _byte(word, less, 0), _byte(word, less, 1), _byte(word, less, 2), _byte(word, less, 3)
    else:
        a, b, c, d = tl.inline_asm_elementwise(
            _BYTES, "=h,=h,=h,=h,r,r", [word, _twice(less)],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=1,
        )  # fmt: skip
    return tl.join(tl.join(a, c), tl.join(b, d))


@triton.jit
def unpack_affine(word, more, factors, terms):
    """As `unpack_bytes`, each byte times its factor plus its term, rounded once.

    factors, terms: uint64 [G, 1 or T], four float16 each.
    """
    less = (1024.0 - more).to(tl.float16)
    if INTERPRETED:
        a = _byte(word, less, 0) * _half(factors, 0) + _half(terms, 0)
        b = _byte(word, less, 1) * _half(factors, 1) + _half(terms, 1)
        c = _byte(word, less, 2) * _half(factors, 2) + _half(terms, 2)
        d = _byte(word, less, 3) * _half(factors, 3) + _half(terms, 3)
    else:
        a, b, c, d = tl.inline_asm_elementwise(
            _AFFINE, "=h,=h,=h,=h,r,r,l,l", [word, _twice(less), factors, terms],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=1,
        )  # fmt: skip
    return tl.join(tl.join(a, c), tl.join(b, d))


@triton.jit
def four(half):
    """uint16 -> uint64, the same four times."""
    two = half.to(tl.uint32) * 0x10001
    return two.to(tl.uint64) | two.to(tl.uint64) << 32


@triton.jit
def _twice(x):
    return x.to(tl.uint16, bitcast=True).to(tl.uint32) * 0x10001


@triton.jit
def _byte(word, less, N: tl.constexpr):
    byte = (word >> 8 * N & 0xFF).to(tl.uint16)
    return (byte | 0x6400).to(tl.float16, bitcast=True) - less


@triton.jit
def _half(four_halves, N: tl.constexpr):
    return (four_halves >> 16 * N & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
