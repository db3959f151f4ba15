"""Device code that reads one piece of a plan (page_batch.py)."""

import triton
import triton.language as tl


@triton.jit
def load_piece(pieces, piece):
    """Its item, negative if there is none, its first page or token and the one after its last."""
    at = pieces + piece * 3
    return tl.load(at), tl.load(at + 1), tl.load(at + 2)
