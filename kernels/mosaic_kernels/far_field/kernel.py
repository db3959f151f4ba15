"""Device code of the far field."""

import triton
import triton.language as tl

from mosaic_kernels.load_piece import load_piece
from mosaic_kernels.load_segment import INVALID, TOPK, find_row, mean_values, topk_codes


@triton.jit
def far_field_kernel(
    far, data, frame_bytes, frames, pieces, epochs, starts, scalars, out, lse, pages,
    HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, FORMATS: tl.constexpr, T: tl.constexpr,
    PAGES: tl.constexpr, DV: tl.constexpr, V_DIM: tl.constexpr, ANY_TOPK: tl.constexpr, ANY_EXCEPTIONS: tl.constexpr,
):  # fmt: skip
    """One program: a piece of pages and a KV head. out [pieces, HEADS, GROUP, V_DIM]."""
    piece, head = tl.program_id(0), tl.program_id(1)
    item, first, last = load_piece(pieces, piece)
    if item < 0:
        return
    of_head = tl.load(epochs + item) * HEADS + head
    start = tl.load(starts + of_head)
    r, c = tl.arange(0, ROWS), tl.arange(0, DV)[:, None]
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    summed = tl.zeros([DV, ROWS], tl.float32)
    for at in range(first, last, PAGES):
        page = at + tl.arange(0, PAGES)[None, :]
        real = page < last
        segment = data + tl.load(frames + tl.minimum(page, last - 1)).to(tl.int64) * frame_bytes + start
        row, kind = find_row(segment, scalars, of_head * FORMATS, FORMATS, ANY_TOPK, ANY_EXCEPTIONS)
        means = mean_values(segment, scalars, row, DV, V_DIM)
        if ANY_TOPK:
            if tl.max((kind == TOPK).to(tl.int32)) > 0:
                mean = tl.zeros([DV, PAGES], tl.float32)
                for t in range(T):
                    codes, token = topk_codes(segment, scalars, row, t, V_DIM, 1, DV, V_DIM)
                    mean += codes.to(tl.float32) * token
                means = tl.where(kind == TOPK, mean / T, means)
        # NaN marks what was never encoded.
        means = tl.where(kind == INVALID, float("nan"), means)
        logit_at = far + (head.to(tl.int64) * pages + tl.trans(page)) * GROUP + r[None, :]
        logits = tl.load(logit_at, mask=tl.trans(real) & (r < GROUP)[None, :], other=float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 0))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp(logits - shift[None, :])
        decay = tl.exp(top - shift)
        total = total * decay + tl.sum(weights, 0)
        summed = summed * decay[None, :] + tl.dot(means.to(tl.float16), weights.to(tl.float16))
        top = new_top
    at = (piece * HEADS + head) * GROUP + r
    summed = tl.where((total > 0)[None, :], summed / total[None, :], summed)
    tl.store(out + at[None, :] * V_DIM + c, summed, (r < GROUP)[None, :] & (c < V_DIM))
    tl.store(lse + at, top + tl.log(total), r < GROUP)
