"""Device code: what a scan keeps of the logits of a page."""

import triton
import triton.language as tl

from mosaic_kernels.scan import keys as of_keys
from mosaic_kernels.tile_attention import LOG2_E

KEYS = tl.constexpr(of_keys.KEYS)
STEPS = tl.constexpr(of_keys.STEPS)
LOWEST = tl.constexpr(of_keys.LOWEST)


@triton.jit
def load_known(known_lse, r, GROUP: tl.constexpr):
    """Log-sum-exp of what is read anyway, float32 [R]: nothing is 0, and rows beyond the group are below everything."""
    known = tl.load(known_lse + r, mask=r < GROUP, other=float("inf"))
    return tl.where(known == float("-inf"), 0.0, known)


@triton.jit
def store_scan(logits, known, keys, page_lse, real):
    """Stores a key for each token, and for each query the log-sum-exp of the page.

    logits: float32 [T, R], in octaves above `known` [R]; keys: [T] and page_lse: [R] pointers; real: rows of queries.
    """
    key = tl.floor(tl.max(logits, 1) * (STEPS / LOG2_E) + (0.5 - LOWEST * STEPS))
    key = tl.minimum(tl.maximum(tl.where(key == key, key, KEYS), 0.0), KEYS - 1.0)
    # No page has more than 2^100 times the attention of what is known.
    lse = known + tl.log2(tl.sum(tl.exp2(tl.minimum(logits, 100.0)), 0)) / LOG2_E
    tl.store(keys, key.to(tl.int16))
    tl.store(page_lse, lse, mask=real)
