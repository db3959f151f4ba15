"""Device code: attention over all tokens of a piece of an item, of segments of any kind, in float16."""

import triton
import triton.language as tl

from mosaic_kernels.load_piece import find_segment, load_piece, of_one
from mosaic_kernels.load_segment import find_row, load_number
from mosaic_kernels.tile_attention import LOG2_E, attend_tile, fetch_tile, load_queries, store_softmax, tile_logits


@triton.jit
def attend_any_pages_kernel(
    q, data, frame_bytes, frames, pieces, epochs, starts, scalars, k_words, v_words, out, lse, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, FORMATS: tl.constexpr, T: tl.constexpr,
    TILE: tl.constexpr, DK: tl.constexpr, K_DIM: tl.constexpr, DV: tl.constexpr, V_DIM: tl.constexpr,
    ANY_TOPK: tl.constexpr, ANY_EXCEPTIONS: tl.constexpr,
):  # fmt: skip
    """One program: a piece and a KV head. q [items, HEADS, GROUP, K_DIM]; out [pieces, HEADS, GROUP, V_DIM]."""
    piece, head = tl.program_id(0), tl.program_id(1)
    item, first, last = load_piece(pieces, piece)
    if item < 0:
        return
    of_head = tl.load(epochs + item) * HEADS + head
    start = tl.load(starts + of_head)
    r, token = tl.arange(0, ROWS), tl.arange(0, TILE)[None, :]
    q += (item * HEADS + head) * GROUP * K_DIM
    factor = scale * LOG2_E
    chunks = load_queries(q, r, factor, K_DIM, DK, GROUP, K_DIM)
    nothing = tl.zeros([1, ROWS], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([TILE, ROWS], tl.float32)
    s0 = tl.zeros([min(DV, 64), ROWS], tl.float32)
    s1, s2, s3 = s0, s0, s0
    rare = tl.zeros([DV, ROWS], tl.float32)
    TILES: tl.constexpr = T // TILE
    data += start
    # Loaded a tile or two before they are used: each waits for the one before.
    segment = find_segment(data, frame_bytes, frames, first)
    next_segment = find_segment(data, frame_bytes, frames, tl.minimum(first * TILES + 1, last * TILES - 1) // TILES)
    number = load_number(segment)
    for at in range(first * TILES, last * TILES):
        next_number = load_number(next_segment)
        after = find_segment(data, frame_bytes, frames, tl.minimum(at + 2, last * TILES - 1) // TILES)
        row, kind = find_row(of_one(number), scalars, of_head * FORMATS, FORMATS)
        t = at % TILES * TILE + token
        k, v, token_scales = fetch_tile(of_one(segment), scalars, k_words, v_words, row, t, DK, K_DIM, DV, V_DIM)
        logits = tile_logits(
            k, q, chunks, r, factor, nothing, of_one(segment), scalars, row, kind, t, K_DIM,
            DK, GROUP, K_DIM, True, ANY_TOPK, ANY_EXCEPTIONS,
        )  # fmt: skip
        top, total, s0, s1, s2, s3, rare = attend_tile(
            v, token_scales, top, total, s0, s1, s2, s3, rare, logits, of_one(segment), scalars, row, kind, t,
            DV, V_DIM, ANY_TOPK, ANY_EXCEPTIONS,
        )  # fmt: skip
        segment, next_segment, number = next_segment, after, next_number
    at = (piece * HEADS + head) * GROUP
    store_softmax(
        out + at * V_DIM, lse + at, r, top, total, s0, s1, s2, s3, rare, GROUP, DV, V_DIM, ANY_TOPK or ANY_EXCEPTIONS
    )
