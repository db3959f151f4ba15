"""Device code that reads one piece of a plan (page_batch.py)."""

import triton
import triton.language as tl

from mosaic_kernels.unpack_bytes import INTERPRETED

_LINE = tl.constexpr(128)
_PREFETCH = tl.constexpr("{ prefetch.global.L2 [$1]; mov.b32 $0, 0; }")


@triton.jit
def load_piece(pieces, piece):
    """Its item, negative if there is none, its first page or token and the one after its last."""
    at = pieces + piece * 3
    return tl.load(at), tl.load(at + 1), tl.load(at + 2)


@triton.jit
def find_segment(data, frame_bytes, frames, page):
    """Where a page's frame lies. data: pointer to the pool's first frame, or as far into it."""
    return data + tl.load(frames + page).to(tl.int64) * frame_bytes


@triton.jit
def of_one(x):
    """A scalar as [1, 1]."""
    return x + tl.zeros([1, 1], tl.int32)


@triton.jit
def prefetch(segment, most, LINES: tl.constexpr):
    """Has the first `most` bytes from a segment on brought to the L2 cache; LINES: of 128 bytes, a power of two that
    holds them."""
    if not INTERPRETED:
        at = tl.arange(0, LINES) * _LINE
        at = segment + tl.where(at < most, at, 0)
        tl.inline_asm_elementwise(_PREFETCH, "=r,l", [at.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1)
