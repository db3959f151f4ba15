"""Device code: attention over a list of tokens, each with a segment of its own."""

import triton
import triton.language as tl

from mosaic_kernels.load_segment import (
    PLANES,
    TOPK,
    exception_key,
    exception_token,
    exception_value,
    exceptions,
    kind_of,
    plane_keys,
    plane_values,
    topk_codes,
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
    item = tl.load(pieces + piece * 3)
    if item < 0:
        return
    first, last = tl.load(pieces + piece * 3 + 1), tl.load(pieces + piece * 3 + 2)
    last = tl.minimum(last, tl.load(first_token + item) + tl.load(counts + head * items + item))
    of_head = tl.load(epochs + item) * HEADS + head
    start = tl.load(starts + of_head)
    r = tl.arange(0, ROWS)
    k_channel, v_channel = tl.arange(0, DK)[None, :], tl.arange(0, DV)[None, :]
    q_at = q + ((item * HEADS + head) * GROUP + r)[:, None] * K_DIM + k_channel
    rows = tl.load(q_at, mask=(r < GROUP)[:, None] & (k_channel < K_DIM), other=0) * scale
    rows = rows.to(tl.float16)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    summed = tl.zeros([ROWS, DV], tl.float32)
    for at in range(first, last, TILE):
        slot = at + tl.arange(0, TILE)[:, None]
        real = slot < last
        # Beyond the end, the first token again: it is there.
        found = tl.load(tokens + head.to(tl.int64) * room + tl.where(real, slot, first))
        page, t = found // T, found % T
        segment = data + tl.load(frames + page).to(tl.int64) * frame_bytes + start
        number = tl.load(segment).to(tl.int32)
        # NaN marks what was never encoded.
        unknown = tl.where(number < FORMATS, 0.0, float("nan"))
        keys = tl.zeros([TILE, DK], tl.float32) + unknown
        values = tl.zeros([TILE, DV], tl.float32) + unknown
        for n in tl.static_range(FORMATS):
            here = number == n
            if tl.max(here.to(tl.int32)) > 0:
                row = of_head * FORMATS + n
                kind = kind_of(scalars, row)
                if kind == PLANES:
                    codes, channel, offset = plane_keys(segment, scalars, k_words, row, t, K_DIM, DK, True, DK)
                    keys = tl.where(here, codes * channel + offset, keys)
                    codes, token, channel, offset = plane_values(segment, scalars, v_words, v_levels, row, t, DV, V_DIM)
                    values = tl.where(here, codes * (token * channel) + offset, values)
                if ANY_TOPK:
                    if kind == TOPK:
                        codes, token = topk_codes(segment, scalars, row, t, K_DIM, 0, DK, K_DIM)
                        keys = tl.where(here, codes * token, keys)
                        codes, token = topk_codes(segment, scalars, row, t, V_DIM, 1, DV, V_DIM)
                        values = tl.where(here, codes * token, values)
                if ANY_EXCEPTIONS:
                    for e in range(exceptions(scalars, row, kind)):
                        this = here & (t == exception_token(segment, scalars, row, e))
                        if tl.max(this.to(tl.int32)) > 0:
                            keys = tl.where(this, exception_key(segment, scalars, row, e, K_DIM, DK, K_DIM), keys)
                            values = tl.where(this, exception_value(segment, scalars, row, e, DV, V_DIM), values)
        logits = tl.dot(rows, tl.trans(keys.to(tl.float16)))
        logits = tl.where(tl.trans(real), logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        weights = tl.exp(logits - new_top[:, None])
        decay = tl.exp(top - new_top)
        total = total * decay + tl.sum(weights, 1)
        summed = summed * decay[:, None] + tl.dot(weights.to(tl.float16), values.to(tl.float16))
        top = new_top
    at = (piece * HEADS + head) * GROUP + r
    summed = tl.where((total > 0)[:, None], summed / total[:, None], summed)
    tl.store(out + at[:, None] * V_DIM + v_channel, summed, (r < GROUP)[:, None] & (v_channel < V_DIM))
    tl.store(lse + at, top + tl.log(total), r < GROUP)
