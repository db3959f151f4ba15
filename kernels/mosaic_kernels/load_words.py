"""Device code: loads that Triton would split, or lay out otherwise.

Triton gives the elements of a tensor to threads before it merges loads; words that one thread wants side by side, in
tensors of their own, it would load one by one. The interpreter does that.
"""

import triton
import triton.language as tl

from mosaic_kernels.unpack_bytes import INTERPRETED

_FOUR = tl.constexpr("ld.global.v4.b32 {$0, $1, $2, $3}, [$4];")
_TWO = tl.constexpr(
    """{
    .reg .pred there;
    setp.ne.s32 there, $3, 0;
    mov.b64 $0, 0;
    mov.b64 $1, 0;
    @there ld.global.v2.b64 {$0, $1}, [$2];
    }"""
)
_BYTE = tl.constexpr(
    """{
    .reg .pred there;
    setp.ne.s32 there, $2, 0;
    mov.b32 $0, 0;
    @there ld.global.u8 $0, [$1];
    }"""
)


@triton.jit
def load_four(at):
    """Four int32 from each pointer to int32, a multiple of 16."""
    if INTERPRETED:
        a, b, c, d = tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
    else:
        a, b, c, d = tl.inline_asm_elementwise(
            _FOUR, "=r,=r,=r,=r,l", [at.to(tl.int64)],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    return a, b, c, d


@triton.jit
def load_two(at, there):
    """Two uint64 from each pointer to uint64, a multiple of 16; 0 where `there` is not."""
    if INTERPRETED:
        a, b = tl.load(at, mask=there, other=0), tl.load(at + 1, mask=there, other=0)
    else:
        a, b = tl.inline_asm_elementwise(
            _TWO, "=&l,=&l,l,r", [at.to(tl.int64), there.to(tl.int32)],
            dtype=(tl.uint64, tl.uint64), is_pure=True, pack=1,
        )  # fmt: skip
    return a, b


@triton.jit
def load_one_byte(at, there):
    """A byte from each pointer, int32; 0 where `there` is not. In the layout of the pointers, which a load of Triton's
    would change."""
    if INTERPRETED:
        byte = tl.load(at, mask=there, other=0).to(tl.int32)
    else:
        byte = tl.inline_asm_elementwise(
            _BYTE, "=&r,l,r", [at.to(tl.int64), there.to(tl.int32)], dtype=tl.int32, is_pure=True, pack=1
        )
    return byte
