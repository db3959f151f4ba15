"""Device code of the far field."""

import triton
import triton.language as tl

from mosaic_kernels.load_piece import load_piece
from mosaic_kernels.load_segment import INVALID, TOPK, find_row, load_number, mean_values, topk_codes
from mosaic_kernels.tile_attention import LOG2_E, any_of, of_tokens, scaled_weights, store_softmax, weigh


@triton.jit
def far_field_kernel(
    far, data, frame_bytes, frames, pieces, epochs, starts, scalars, out, lse, pages,
    HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, FORMATS: tl.constexpr, T: tl.constexpr,
    PAGES: tl.constexpr, DV: tl.constexpr, V_DIM: tl.constexpr, ANY_TOPK: tl.constexpr,
):  # fmt: skip
    """One program: a piece of pages and a KV head. out [pieces, HEADS, GROUP, V_DIM]."""
    piece, head = tl.program_id(0), tl.program_id(1)
    item, first, last = load_piece(pieces, piece)
    if item < 0:
        return
    of_head = tl.load(epochs + item) * HEADS + head
    start = tl.load(starts + of_head)
    r, slot = tl.arange(0, ROWS), tl.arange(0, PAGES)[None, :]
    GROUPS: tl.constexpr = min(DV // 16, 4)
    if not ANY_TOPK:
        # Not in order: Triton would give a thread neighbouring pages, not those whose means it unpacks.
        slot = tl.broadcast_to(slot % 8 * (PAGES // 8) + slot // 8, [GROUPS, PAGES])
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([PAGES, ROWS], tl.float32)
    s0 = tl.zeros([GROUPS * 16, ROWS], tl.float32)
    s1, s2, s3 = s0, s0, s0
    sparse_sum = tl.zeros([DV, ROWS], tl.float32)
    for at in range(first, last, PAGES):
        page = at + slot
        segment = data + tl.load(frames + tl.minimum(page, last - 1)).to(tl.int64) * frame_bytes + start
        row, kind = find_row(load_number(segment), scalars, of_head * FORMATS, FORMATS)
        number = of_tokens(page)
        logit_at = far + (head.to(tl.int64) * pages + number) * GROUP + r[None, :]
        logits = tl.load(logit_at, mask=(number < last) & (r < GROUP)[None, :], other=float("-inf")) * LOG2_E
        # NaN marks what was never encoded.
        logits = tl.where(of_tokens(kind) == INVALID, float("nan"), logits)
        top, total, weights, decay = weigh(top, total, logits)
        if ANY_TOPK:
            sparse_sum *= decay
            sparse = kind == TOPK
            if any_of(sparse):
                mean = tl.zeros([DV, PAGES], tl.float32)
                for t in range(T):
                    codes, token = topk_codes(segment, scalars, row, t, V_DIM, 1, DV, V_DIM)
                    mean += tl.where(sparse, codes.to(tl.float32) * token, 0.0)
                sparse_sum += tl.dot((mean / T).to(tl.float16), weights.to(tl.float16))
                weights = tl.where(tl.trans(sparse), 0.0, weights)
        units, scale = mean_values(segment, scalars, row, 0, GROUPS, V_DIM)
        scaled = scaled_weights(weights, scale)
        s0 = tl.dot(units, scaled, s0 * decay)
        if DV > 64:
            s1 = tl.dot(mean_values(segment, scalars, row, 1, GROUPS, V_DIM)[0], scaled, s1 * decay)
        if DV > 128:
            s2 = tl.dot(mean_values(segment, scalars, row, 2, GROUPS, V_DIM)[0], scaled, s2 * decay)
            s3 = tl.dot(mean_values(segment, scalars, row, 3, GROUPS, V_DIM)[0], scaled, s3 * decay)
    at = (piece * HEADS + head) * GROUP
    store_softmax(out + at * V_DIM, lse + at, r, top, total, s0, s1, s2, s3, sparse_sum, GROUP, DV, V_DIM, ANY_TOPK)
