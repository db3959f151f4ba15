"""Device code: attention over all tokens of a piece of an item, flash-decoding's online softmax over its pages."""

import triton
import triton.language as tl

from mosaic_kernels.load_segment import (
    exception_key,
    exception_token,
    exception_value,
    exceptions,
    find_row,
    load_keys,
    load_values,
)


@triton.jit
def score(q, codes, token_scale, channel_scale, offset):
    """Logits float32 [R, T] of rows q [R, D] against keys of one segment (load_segment.py)."""
    logits = tl.dot((q * channel_scale).to(tl.float16), tl.trans(codes.to(tl.float16)))
    return logits * tl.trans(token_scale) + tl.sum(q * offset, 1)[:, None]


@triton.jit
def weigh(weights, codes, token_scale, channel_scale, offset):
    """Sum of values of one segment by weights [R, T], 0 for what is not to be read: float32 [R, D]."""
    scaled = tl.where(weights == 0, 0.0, weights * tl.trans(token_scale))
    summed = tl.dot(scaled.to(tl.float16), codes.to(tl.float16))
    return summed * channel_scale + tl.sum(weights, 1)[:, None] * offset


@triton.jit
def attend_pages_kernel(
    q, data, frame_bytes, frames, pieces, epochs, starts, scalars, k_words, v_words, v_levels, out, lse, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, FORMATS: tl.constexpr, T: tl.constexpr,
    DK: tl.constexpr, K_DIM: tl.constexpr, DV: tl.constexpr, V_DIM: tl.constexpr,
    ANY_TOPK: tl.constexpr, ANY_EXCEPTIONS: tl.constexpr,
):  # fmt: skip
    """One program: a piece and a KV head. q [items, HEADS, GROUP, K_DIM]; out [pieces, HEADS, GROUP, V_DIM]."""
    piece, head = tl.program_id(0), tl.program_id(1)
    item = tl.load(pieces + piece * 3)
    if item < 0:
        return
    first, last = tl.load(pieces + piece * 3 + 1), tl.load(pieces + piece * 3 + 2)
    of_head = tl.load(epochs + item) * HEADS + head
    start = tl.load(starts + of_head)
    r, t = tl.arange(0, ROWS), tl.arange(0, T)[:, None]
    k_channel, v_channel = tl.arange(0, DK)[None, :], tl.arange(0, DV)[None, :]
    q_at = q + ((item * HEADS + head) * GROUP + r)[:, None] * K_DIM + k_channel
    rows = tl.load(q_at, mask=(r < GROUP)[:, None] & (k_channel < K_DIM), other=0) * scale
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    summed = tl.zeros([ROWS, DV], tl.float32)
    for page in range(first, last):
        segment = data + tl.load(frames + page).to(tl.int64) * frame_bytes + start
        row, kind = find_row(segment, scalars, of_head * FORMATS, FORMATS)
        codes, token_scale, channel_scale, offset = load_keys(
            segment, scalars, k_words, row, kind, t, K_DIM, DK, K_DIM, True, ANY_TOPK, DK
        )
        logits = score(rows, codes, token_scale, channel_scale, offset)
        if ANY_EXCEPTIONS:
            for e in range(exceptions(scalars, row, kind)):
                here = tl.trans(t) == exception_token(segment, scalars, row, e)
                exact = tl.sum(rows * exception_key(segment, scalars, row, e, K_DIM, DK, K_DIM), 1)
                logits = tl.where(here, exact[:, None], logits)
        new_top = tl.maximum(top, tl.max(logits, 1))
        weights = tl.exp(logits - new_top[:, None])
        decay = tl.exp(top - new_top)
        total = total * decay + tl.sum(weights, 1)
        summed = summed * decay[:, None]
        top = new_top
        if ANY_EXCEPTIONS:
            for e in range(exceptions(scalars, row, kind)):
                here = tl.trans(t) == exception_token(segment, scalars, row, e)
                weight = tl.sum(tl.where(here, weights, 0.0), 1)
                summed += weight[:, None] * exception_value(segment, scalars, row, e, DV, V_DIM)
                weights = tl.where(here, 0.0, weights)
        codes, token_scale, channel_scale, offset = load_values(
            segment, scalars, v_words, v_levels, row, kind, t, DV, V_DIM, ANY_TOPK
        )
        summed += weigh(weights, codes, token_scale, channel_scale, offset)
    at = (piece * HEADS + head) * GROUP + r
    tl.store(out + at[:, None] * V_DIM + v_channel, summed / total[:, None], (r < GROUP)[:, None] & (v_channel < V_DIM))
    tl.store(lse + at, top + tl.log(total), r < GROUP)
