"""Device code: segments of any format -> K and V in the rotated bases."""

import triton
import triton.language as tl

from mosaic_kernels.load_segment import (
    PLANES,
    TOPK,
    exception_key,
    exception_token,
    exception_value,
    exceptions,
    fetch_values,
    find_row,
    key_codes,
    load_number,
    mean_values,
    plane_values,
    topk_codes,
    value_channels,
    value_scales,
)


@triton.jit
def decode_kernel(
    data, frame_bytes, frames, starts, scalars, k_words, v_words, epoch, k_out, v_out, pages,
    HEADS: tl.constexpr, FORMATS: tl.constexpr, T: tl.constexpr, TILE: tl.constexpr,
    DK: tl.constexpr, K_DIM: tl.constexpr, DV: tl.constexpr, V_DIM: tl.constexpr,
    ANY_TOPK: tl.constexpr, ANY_EXCEPTIONS: tl.constexpr,
):  # fmt: skip
    """One program: TILE tokens of one page and head. Outputs [HEADS, pages, T, dim]."""
    page, head, first = tl.program_id(0), tl.program_id(1), tl.program_id(2) * TILE
    of_head = epoch * HEADS + head
    segment = data + tl.load(frames + page).to(tl.int64) * frame_bytes + tl.load(starts + of_head)
    row, kind = find_row(load_number(segment), scalars, of_head * FORMATS, FORMATS)
    t = (first + tl.arange(0, TILE))[None, :]
    # NaN marks what was never encoded.
    keys = tl.full([DK, TILE], float("nan"), tl.float32)
    values = tl.full([DV, TILE], float("nan"), tl.float32)
    if kind == PLANES:
        codes, scale, offset = key_codes(segment, scalars, k_words, row, t, DK, K_DIM)
        keys = codes.to(tl.float32) * scale + offset
        values = plane_values(fetch_values(segment, v_words, row, t, 0, DV // 16, V_DIM, DV), DV // 16).to(tl.float32)
        means, scale = mean_values(segment, scalars, row, 0, DV // 16, V_DIM)
        coded = tl.arange(0, DV)[:, None] < value_channels(scalars, row)
        values = tl.where(coded, values * value_scales(segment, scalars, row, t), means.to(tl.float32) * scale)
    if ANY_TOPK:
        if kind == TOPK:
            codes, token = topk_codes(segment, scalars, row, t, K_DIM, 0, DK, K_DIM)
            keys = codes.to(tl.float32) * token
            codes, token = topk_codes(segment, scalars, row, t, V_DIM, 1, DV, V_DIM)
            values = codes.to(tl.float32) * token
    if ANY_EXCEPTIONS:
        for e in range(exceptions(scalars, row, kind)):
            here = t == exception_token(segment, scalars, row, e)
            keys = tl.where(here, exception_key(segment, scalars, row, e, K_DIM, DK, K_DIM), keys)
            values = tl.where(here, exception_value(segment, scalars, row, e, DV, V_DIM), values)
    at = (head * pages + page).to(tl.int64) * T + t
    k_channel, v_channel = tl.arange(0, DK)[:, None], tl.arange(0, DV)[:, None]
    tl.store(k_out + at * K_DIM + k_channel, keys, mask=k_channel < K_DIM)
    tl.store(v_out + at * V_DIM + v_channel, values, mask=v_channel < V_DIM)
