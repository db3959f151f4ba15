"""Device code: attention over a list of tokens, each with a segment of its own."""

import triton
import triton.language as tl

from mosaic_kernels.load_piece import load_piece
from mosaic_kernels.load_segment import find_row, load_number
from mosaic_kernels.tile_attention import (
    LOG2_E,
    attend_tile,
    fetch_tile,
    load_queries,
    of_tokens,
    store_softmax,
    tile_logits,
)


@triton.jit
def attend_selected_kernel(
    q, data, frame_bytes, frames, tokens, counts, pieces, first_token, epochs, starts,
    scalars, k_words, v_words, out, lse, room, items, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, FORMATS: tl.constexpr, T: tl.constexpr,
    TILE: tl.constexpr, DK: tl.constexpr, K_DIM: tl.constexpr, DV: tl.constexpr, V_DIM: tl.constexpr,
    ANY_TOPK: tl.constexpr, ANY_EXCEPTIONS: tl.constexpr,
):  # fmt: skip
    """One program: a piece of an item's list and a KV head. out [pieces, HEADS, GROUP, V_DIM]."""
    piece, head = tl.program_id(0), tl.program_id(1)
    item, first, last = load_piece(pieces, piece)
    if item < 0:
        return
    last = tl.minimum(last, tl.load(first_token + item) + tl.load(counts + head * items + item))
    of_head = tl.load(epochs + item) * HEADS + head
    start = tl.load(starts + of_head)
    r, slot = tl.arange(0, ROWS), tl.arange(0, TILE)[None, :]
    GROUPS: tl.constexpr = min(DK // 16, 4)
    if min(DV // 16, 4) == GROUPS and not (ANY_TOPK or ANY_EXCEPTIONS):
        # Not in order: Triton would give a thread neighbouring tokens, not those that it unpacks.
        slot = tl.broadcast_to(slot % 8 * (TILE // 8) + slot // 8, [GROUPS, TILE])
    q += (item * HEADS + head) * GROUP * K_DIM
    tokens += head.to(tl.int64) * room
    factor = scale * LOG2_E
    chunks = load_queries(q, r, factor, K_DIM, DK, GROUP, K_DIM)
    nothing = tl.zeros([1, ROWS], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([TILE, ROWS], tl.float32)
    s0 = tl.zeros([min(DV, 64), ROWS], tl.float32)
    s1, s2, s3 = s0, s0, s0
    rare = tl.zeros([DV, ROWS], tl.float32)
    data += start
    # Loaded some tiles before they are used: each waits for the one before.
    found = _token(tokens, first + slot, first, last)
    next_found = _token(tokens, first + TILE + slot, first, last)
    after = _token(tokens, first + 2 * TILE + slot, first, last)
    segment = data + tl.load(frames + found // T).to(tl.int64) * frame_bytes
    next_segment = data + tl.load(frames + next_found // T).to(tl.int64) * frame_bytes
    number = load_number(segment)
    for at in range(first, last, TILE):
        next_number = load_number(next_segment)
        segment_after = data + tl.load(frames + after // T).to(tl.int64) * frame_bytes
        later = _token(tokens, at + 3 * TILE + slot, first, last)
        row, kind = find_row(number, scalars, of_head * FORMATS, FORMATS)
        real, t = at + slot < last, found % T
        k, v, token_scales = fetch_tile(segment, scalars, k_words, v_words, row, t, DK, K_DIM, DV, V_DIM)
        logits = tile_logits(
            k, q, chunks, r, factor, nothing, segment, scalars, row, kind, t, K_DIM,
            DK, GROUP, K_DIM, True, ANY_TOPK, ANY_EXCEPTIONS,
        )  # fmt: skip
        logits = tl.where(of_tokens(real.to(tl.int32)) > 0, logits, float("-inf"))
        top, total, s0, s1, s2, s3, rare = attend_tile(
            v, token_scales, top, total, s0, s1, s2, s3, rare, logits, segment, scalars, row, kind, t,
            DV, V_DIM, ANY_TOPK, ANY_EXCEPTIONS,
        )  # fmt: skip
        segment, number, next_segment = next_segment, next_number, segment_after
        found, next_found, after = next_found, after, later
    at = (piece * HEADS + head) * GROUP
    store_softmax(
        out + at * V_DIM, lse + at, r, top, total, s0, s1, s2, s3, rare, GROUP, DV, V_DIM, ANY_TOPK or ANY_EXCEPTIONS
    )


@triton.jit
def _token(tokens, at, first, last):
    """What the list has at places; beyond its end the first token again, and of an empty one 0: they are there."""
    return tl.load(tokens + tl.where(at < last, at, first), mask=first < last, other=0)
