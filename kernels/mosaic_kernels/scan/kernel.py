"""Device code of the scan."""

import triton
import triton.language as tl

from mosaic_kernels.load_piece import find_segment, load_piece, of_one
from mosaic_kernels.load_segment import find_row, load_number
from mosaic_kernels.page_logits import load_chunks, page_logits
from mosaic_kernels.scan import keys as of_keys
from mosaic_kernels.tile_attention import LOG2_E, fetch_key_tile, load_queries, tile_logits

KEYS = tl.constexpr(of_keys.KEYS)
STEPS = tl.constexpr(of_keys.STEPS)
LOWEST = tl.constexpr(of_keys.LOWEST)


@triton.jit
def scan_kernel(
    q, data, frame_bytes, frames, pieces, epochs, requests, starts, scan_channels, scalars, k_words,
    known_lse, keys, page_lse, pages, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, R: tl.constexpr, FORMATS: tl.constexpr, T: tl.constexpr,
    DS: tl.constexpr, K_DIM: tl.constexpr, DK: tl.constexpr, BYTES: tl.constexpr,
    ANY_TOPK: tl.constexpr, ANY_EXCEPTIONS: tl.constexpr,
):  # fmt: skip
    """One program: a piece and a KV head. keys [HEADS, pages, T]; page_lse [HEADS, pages, GROUP].

    BYTES: segments are of planes, k_words are a table's k_bytes, and products are of integers.
    """
    piece, head = tl.program_id(0), tl.program_id(1)
    item, first, last = load_piece(pieces, piece)
    if item < 0:
        return
    of_head = tl.load(epochs + item) * HEADS + head
    start, channels = tl.load(starts + of_head), tl.load(scan_channels + of_head)
    r, t = tl.arange(0, R), tl.arange(0, T)
    real = r < GROUP
    q += (item * HEADS + head) * GROUP * K_DIM
    factor = scale * LOG2_E
    if BYTES:
        chunks = load_chunks(q, r, factor, channels, DS, GROUP, K_DIM)
    else:
        chunks = load_queries(q, r, factor, channels, DS, GROUP, K_DIM)
    # Rows beyond the group are below everything.
    known = tl.load(known_lse + (tl.load(requests + item) * HEADS + head) * GROUP + r, mask=real, other=float("inf"))
    known = tl.where(known == float("-inf"), 0.0, known)
    data += start
    # Loaded a page or two before they are used: each waits for the one before.
    segment = find_segment(data, frame_bytes, frames, first)
    next_segment = find_segment(data, frame_bytes, frames, tl.minimum(first + 1, last - 1))
    number = load_number(segment)
    for page in range(first, last):
        next_number = load_number(next_segment)
        after = find_segment(data, frame_bytes, frames, tl.minimum(page + 2, last - 1))
        # In octaves above what is known.
        if BYTES:
            row, kind = find_row(number, scalars, of_head * FORMATS, FORMATS)
            logits = page_logits(
                chunks, of_one(segment), scalars, k_words, of_one(row), kind, t[None, :], channels, False, DS, R, DK
            )
            logits -= known[None, :] * LOG2_E
        else:
            row, kind = find_row(of_one(number), scalars, of_head * FORMATS, FORMATS)
            k = fetch_key_tile(of_one(segment), scalars, k_words, row, t[None, :], channels, DS, False, DK)
            logits = tile_logits(
                k, q, chunks, r, factor, (-known * LOG2_E)[None, :], of_one(segment), scalars, row, kind,
                t[None, :], channels, DS, GROUP, K_DIM, False, ANY_TOPK, ANY_EXCEPTIONS,
            )  # fmt: skip
        key = tl.floor(tl.max(logits, 1) * (STEPS / LOG2_E) + (0.5 - LOWEST * STEPS))
        key = tl.minimum(tl.maximum(tl.where(key == key, key, KEYS), 0.0), KEYS - 1.0)
        # No page has more than 2^100 times the attention of what is known.
        lse = known + tl.log2(tl.sum(tl.exp2(tl.minimum(logits, 100.0)), 0)) / LOG2_E
        at = (head * pages + page).to(tl.int64)
        tl.store(keys + at * T + t, key.to(tl.int16))
        tl.store(page_lse + at * GROUP + r, lse, mask=real)
        segment, next_segment, number = next_segment, after, next_number
