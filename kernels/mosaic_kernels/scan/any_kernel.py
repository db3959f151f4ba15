"""Device code of the scan, of segments of any kind, in float16."""

import triton
import triton.language as tl

from mosaic_kernels.load_piece import find_segment, load_piece, of_one
from mosaic_kernels.load_segment import find_row, load_number
from mosaic_kernels.scan.results import load_known, store_scan
from mosaic_kernels.tile_attention import LOG2_E, fetch_key_tile, load_queries, tile_logits


@triton.jit
def scan_any_kernel(
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
    q += (item * HEADS + head) * GROUP * K_DIM
    factor = scale * LOG2_E
    chunks = load_queries(q, r, factor, channels, DS, GROUP, K_DIM)
    known = load_known(known_lse + (tl.load(requests + item) * HEADS + head) * GROUP, r, GROUP)
    data += start
    # Loaded a page or two before they are used: each waits for the one before.
    segment = find_segment(data, frame_bytes, frames, first)
    next_segment = find_segment(data, frame_bytes, frames, tl.minimum(first + 1, last - 1))
    number = load_number(segment)
    for page in range(first, last):
        next_number = load_number(next_segment)
        after = find_segment(data, frame_bytes, frames, tl.minimum(page + 2, last - 1))
        row, kind = find_row(of_one(number), scalars, of_head * FORMATS, FORMATS)
        k = fetch_key_tile(of_one(segment), scalars, k_words, row, t[None, :], channels, DS, False, DK)
        # In octaves above what is known.
        logits = tile_logits(
            k, q, chunks, r, factor, (-known * LOG2_E)[None, :], of_one(segment), scalars, row, kind,
            t[None, :], channels, DS, GROUP, K_DIM, False, ANY_TOPK, ANY_EXCEPTIONS,
        )  # fmt: skip
        at = (head * pages + page).to(tl.int64)
        store_scan(logits, known, keys + at * T + t, page_lse + at * GROUP + r, r < GROUP)
        segment, next_segment, number = next_segment, after, next_number
