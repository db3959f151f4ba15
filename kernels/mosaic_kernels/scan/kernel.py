"""Device code of the scan, of segments of planes, in integers."""

import triton
import triton.language as tl

from mosaic_kernels.load_piece import find_segment, load_piece, of_one
from mosaic_kernels.load_segment import find_row, load_number
from mosaic_kernels.page_logits import load_chunks, page_logits, page_query
from mosaic_kernels.scan.results import load_known, store_scan
from mosaic_kernels.tile_attention import LOG2_E


@triton.jit
def scan_kernel(
    q, data, frame_bytes, frames, pieces, epochs, requests, starts, scan_channels, scalars, k_bytes,
    known_lse, keys, page_lse, pages, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, R: tl.constexpr, FORMATS: tl.constexpr, T: tl.constexpr,
    DS: tl.constexpr, K_DIM: tl.constexpr, DK: tl.constexpr,
):  # fmt: skip
    """One program: a piece and a KV head. keys [HEADS, pages, T]; page_lse [HEADS, pages, GROUP]."""
    piece, head = tl.program_id(0), tl.program_id(1)
    item, first, last = load_piece(pieces, piece)
    if item < 0:
        return
    of_head = tl.load(epochs + item) * HEADS + head
    start, channels = tl.load(starts + of_head), tl.load(scan_channels + of_head)
    r, t = tl.arange(0, R), tl.arange(0, T)
    q += (item * HEADS + head) * GROUP * K_DIM
    chunks = load_chunks(q, r, scale * LOG2_E, channels, DS, GROUP, K_DIM)
    known = load_known(known_lse + (tl.load(requests + item) * HEADS + head) * GROUP, r, GROUP)
    data += start
    # Loaded a page or two before they are used: each waits for the one before.
    segment = find_segment(data, frame_bytes, frames, first)
    next_segment = find_segment(data, frame_bytes, frames, tl.minimum(first + 1, last - 1))
    number = load_number(segment)
    for page in range(first, last):
        next_number = load_number(next_segment)
        after = find_segment(data, frame_bytes, frames, tl.minimum(page + 2, last - 1))
        row, kind = find_row(number, scalars, of_head * FORMATS, FORMATS)
        query = page_query(chunks, of_one(segment), scalars, k_bytes, of_one(row), channels, False, DS, DK)
        logits = page_logits(query, of_one(segment), k_bytes, of_one(row), kind, t[None, :], False, DS, R, DK)
        at = (head * pages + page).to(tl.int64)
        store_scan(logits - known[None, :] * LOG2_E, known, keys + at * T + t, page_lse + at * GROUP + r, r < GROUP)
        segment, next_segment, number = next_segment, after, next_number
