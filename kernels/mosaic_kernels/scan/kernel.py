"""Device code of the scan."""

import triton
import triton.language as tl

from mosaic_kernels.attend_pages.kernel import LOG2_E, load_queries, page_logits
from mosaic_kernels.load_piece import load_piece
from mosaic_kernels.load_segment import INVALID, find_row
from mosaic_kernels.scan import keys as of_keys

KEYS = tl.constexpr(of_keys.KEYS)
STEPS = tl.constexpr(of_keys.STEPS)
LOWEST = tl.constexpr(of_keys.LOWEST)


@triton.jit
def scan_kernel(
    q, data, frame_bytes, frames, pieces, epochs, requests, starts, scan_channels, scalars, k_words,
    known_lse, keys, page_lse, pages, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, FORMATS: tl.constexpr, T: tl.constexpr,
    DS: tl.constexpr, K_DIM: tl.constexpr, DK: tl.constexpr, ANY_TOPK: tl.constexpr, ANY_EXCEPTIONS: tl.constexpr,
):  # fmt: skip
    """One program: a piece and a KV head. keys [HEADS, pages, T]; page_lse [HEADS, pages, GROUP]."""
    piece, head = tl.program_id(0), tl.program_id(1)
    item, first, last = load_piece(pieces, piece)
    if item < 0:
        return
    of_head = tl.load(epochs + item) * HEADS + head
    start, channels = tl.load(starts + of_head), tl.load(scan_channels + of_head)
    r, t = tl.arange(0, ROWS), tl.arange(0, T)
    real = r < GROUP
    q += (item * HEADS + head) * GROUP * K_DIM
    GROUPS: tl.constexpr = min(DS // 16, 4)
    factor = scale * LOG2_E
    q0 = load_queries(q, r, factor, channels, 0, GROUPS, GROUP, K_DIM)
    q1 = load_queries(q, r, factor, channels, 1, GROUPS, GROUP, K_DIM)
    q2 = load_queries(q, r, factor, channels, 2, GROUPS, GROUP, K_DIM)
    q3 = load_queries(q, r, factor, channels, 3, GROUPS, GROUP, K_DIM)
    # Rows beyond the group are below everything.
    known = tl.load(known_lse + (tl.load(requests + item) * HEADS + head) * GROUP + r, mask=real, other=float("inf"))
    known = tl.where(known == float("-inf"), 0.0, known)
    for page in range(first, last):
        segment = data + tl.load(frames + page).to(tl.int64) * frame_bytes + start
        row, kind = find_row(segment, scalars, of_head * FORMATS, FORMATS, ANY_TOPK, ANY_EXCEPTIONS)
        # In octaves above what is known.
        logits = page_logits(
            q, q0, q1, q2, q3, r, factor, (-known * LOG2_E)[None, :],
            segment, scalars, k_words, row, kind, t[None, :], channels,
            DS, GROUPS, GROUP, K_DIM, DK, False, ANY_TOPK, ANY_EXCEPTIONS,
        )  # fmt: skip
        key = tl.floor(tl.max(logits, 1) * (STEPS / LOG2_E) + (0.5 - LOWEST * STEPS))
        key = tl.minimum(tl.maximum(tl.where(key == key, key, KEYS), 0.0), KEYS - 1.0)
        # No page has more than 2^100 times the attention of what is known.
        lse = known + tl.log2(tl.sum(tl.exp2(tl.minimum(logits, 100.0)), 0)) / LOG2_E
        # NaN marks what was never encoded.
        lse = tl.where(kind == INVALID, float("nan"), lse)
        at = (head * pages + page).to(tl.int64)
        tl.store(keys + at * T + t, key.to(tl.int16))
        tl.store(page_lse + at * GROUP + r, lse, mask=real)
