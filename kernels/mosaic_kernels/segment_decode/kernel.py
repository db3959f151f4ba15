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


# Compiled once for any number of pages: it takes seconds, in the middle of serving.
@triton.jit(do_not_specialize=["pages", "epoch"])
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
    keys = decode_keys(segment, scalars, k_words, row, kind, t, DK, K_DIM, ANY_TOPK, ANY_EXCEPTIONS)
    values = decode_values(segment, scalars, v_words, row, kind, t, DV, V_DIM, ANY_TOPK, ANY_EXCEPTIONS)
    at = (head * pages + page).to(tl.int64) * T + t
    k_channel, v_channel = tl.arange(0, DK)[:, None], tl.arange(0, DV)[:, None]
    tl.store(k_out + at * K_DIM + k_channel, keys, mask=k_channel < K_DIM)
    tl.store(v_out + at * V_DIM + v_channel, values, mask=v_channel < V_DIM)


@triton.jit
def decode_keys(
    segment, scalars, k_words, row, kind, t,
    D: tl.constexpr, DIM: tl.constexpr, ANY_TOPK: tl.constexpr, ANY_EXCEPTIONS: tl.constexpr,
):  # fmt: skip
    """K of the tokens `t` [1, T] of a segment: float32 [D, T]; NaN if it was never encoded."""
    keys = tl.full([D, t.shape[1]], float("nan"), tl.float32)
    if kind == PLANES:
        codes, scale, offset = key_codes(segment, scalars, k_words, row, t, D, DIM)
        keys = codes.to(tl.float32) * scale + offset
    if ANY_TOPK:
        if kind == TOPK:
            codes, token = topk_codes(segment, scalars, row, t, DIM, 0, D, DIM)
            keys = codes.to(tl.float32) * token
    if ANY_EXCEPTIONS:
        for e in range(exceptions(scalars, row, kind)):
            here = t == exception_token(segment, scalars, row, e)
            keys = tl.where(here, exception_key(segment, scalars, row, e, DIM, D, DIM), keys)
    return keys


@triton.jit
def decode_values(
    segment, scalars, v_words, row, kind, t,
    D: tl.constexpr, DIM: tl.constexpr, ANY_TOPK: tl.constexpr, ANY_EXCEPTIONS: tl.constexpr,
):  # fmt: skip
    """The same of V."""
    values = tl.full([D, t.shape[1]], float("nan"), tl.float32)
    if kind == PLANES:
        values = plane_values(fetch_values(segment, v_words, row, t, 0, D // 16, DIM, D), D // 16).to(tl.float32)
        means, scale = mean_values(segment, scalars, row, 0, D // 16, DIM)
        coded = tl.arange(0, D)[:, None] < value_channels(scalars, row)
        values = tl.where(coded, values * value_scales(segment, scalars, row, t), means.to(tl.float32) * scale)
    if ANY_TOPK:
        if kind == TOPK:
            codes, token = topk_codes(segment, scalars, row, t, DIM, 1, D, DIM)
            values = codes.to(tl.float32) * token
    if ANY_EXCEPTIONS:
        for e in range(exceptions(scalars, row, kind)):
            here = t == exception_token(segment, scalars, row, e)
            values = tl.where(here, exception_value(segment, scalars, row, e, D, DIM), values)
    return values
