"""Device code: attention over a list of tokens, each with a segment of its own."""

import triton
import triton.language as tl

from mosaic_kernels.attend_pages.kernel import LOG2_E, load_queries
from mosaic_kernels.load_piece import load_piece
from mosaic_kernels.load_segment import (
    INVALID,
    TOPK,
    exception_key,
    exception_token,
    exception_value,
    exceptions,
    find_row,
    in_key_order,
    mean_values,
    plane_keys,
    plane_values,
    topk_codes,
    value_channels,
)


@triton.jit
def attend_selected_kernel(
    q, data, frame_bytes, frames, tokens, counts, pieces, first_token, epochs, starts,
    scalars, k_words, v_words, v_levels, out, lse, room, items, scale,
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
    r = tl.arange(0, ROWS)
    v_channel = tl.arange(0, DV)[:, None]
    q += (item * HEADS + head) * GROUP * K_DIM
    rows = load_queries(q, r, scale * LOG2_E, K_DIM, 0, DK // 16, GROUP, K_DIM)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    # Summed over the tokens at the end only.
    total = tl.zeros([TILE, ROWS], tl.float32)
    summed = tl.zeros([DV, ROWS], tl.float32)
    for at in range(first, last, TILE):
        slot = at + tl.arange(0, TILE)[None, :]
        real = slot < last
        # Beyond the end, the first token again: it is there.
        found = tl.load(tokens + head.to(tl.int64) * room + tl.where(real, slot, first))
        page, t = found // T, found % T
        segment = data + tl.load(frames + page).to(tl.int64) * frame_bytes + start
        row, kind = find_row(segment, scalars, of_head * FORMATS, FORMATS, ANY_TOPK, ANY_EXCEPTIONS)
        keys = plane_keys(segment, scalars, k_words, row, t, K_DIM, 0, DK // 16, True, DK)
        values, token_scale = plane_values(segment, scalars, v_words, v_levels, row, t, DV, V_DIM)
        coded = value_channels(scalars, row)
        means = tl.zeros([DV, TILE], tl.float16)
        if tl.min(coded) < V_DIM:
            means = mean_values(segment, scalars, row, DV, V_DIM)
            means = tl.where(v_channel < coded, 0.0, means).to(tl.float16)
        if ANY_TOPK:
            sparse = kind == TOPK
            if tl.max(sparse.to(tl.int32)) > 0:
                codes, token = topk_codes(segment, scalars, row, t, K_DIM, 0, DK, K_DIM)
                keys = tl.where(tl.trans(sparse), in_key_order((codes * token).to(tl.float16), DK), keys)
                codes, token = topk_codes(segment, scalars, row, t, V_DIM, 1, DV, V_DIM)
                values, token_scale = tl.where(sparse, codes, values), tl.where(sparse, token, token_scale)
                means = tl.where(sparse, 0.0, means).to(tl.float16)
        if ANY_EXCEPTIONS:
            kept = exceptions(scalars, row, kind)
            for e in range(tl.max(kept)):
                here = (e < kept) & (t == exception_token(segment, scalars, row, e))
                if tl.max(here.to(tl.int32)) > 0:
                    exact = exception_key(segment, scalars, row, e, K_DIM, DK, K_DIM).to(tl.float16)
                    keys = tl.where(tl.trans(here), in_key_order(exact, DK), keys)
                    exact = exception_value(segment, scalars, row, e, DV, V_DIM).to(tl.float16)
                    means = tl.where(here, exact, means)
                    token_scale = tl.where(here, 0.0, token_scale)
        # NaN marks what was never encoded.
        keys = tl.where(tl.trans(kind == INVALID), float("nan"), keys).to(tl.float16)
        logits = tl.dot(keys, rows)
        logits = tl.where(tl.trans(real), logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 0))
        weights = tl.exp2(logits - new_top[None, :])
        decay = tl.exp2(top - new_top)
        total = total * decay[None, :] + weights
        summed = summed * decay[None, :]
        summed += tl.dot(values, (weights * tl.trans(token_scale)).to(tl.float16))
        summed += tl.dot(means, weights.to(tl.float16))
        top = new_top
    total = tl.sum(total, 0)
    at = (piece * HEADS + head) * GROUP + r
    summed = tl.where((total > 0)[None, :], summed / total[None, :], summed)
    tl.store(out + at[None, :] * V_DIM + v_channel, summed, (r < GROUP)[None, :] & (v_channel < V_DIM))
    tl.store(lse + at, (top + tl.log2(total)) / LOG2_E, r < GROUP)
