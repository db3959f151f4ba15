"""Device code that reads one piece of a plan (page_batch.py)."""

import triton
import triton.language as tl


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
