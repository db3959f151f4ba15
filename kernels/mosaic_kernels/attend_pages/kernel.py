"""Device code: attention over all tokens of a piece of an item, flash-decoding's online softmax over its pages.

Tokens or channels lie along the first dimension and query heads along the second: tensor cores then multiply tiles of
64 tokens or channels, not of a handful of query heads.
"""

import triton
import triton.language as tl

from mosaic_kernels.load_piece import load_piece
from mosaic_kernels.load_segment import (
    INVALID,
    TOPK,
    exception_key,
    exception_token,
    exception_value,
    exceptions,
    find_row,
    key_channels,
    mean_values,
    plane_keys,
    plane_values,
    topk_codes,
    value_channels,
)

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_queries(
    q, r, factor, channels, CHUNK: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr
):
    """Queries of a chunk of channels times a factor, float16 [GROUPS * 16, R] in the order of `key_channels`.

    q: pointer to float32 [GROUP, DIM]; channels from `channels` on and rows beyond GROUP are 0.
    """
    c = key_channels(CHUNK, GROUPS)[:, None]
    found = tl.load(q + r[None, :] * DIM + c, mask=(r < GROUP)[None, :] & (c < channels), other=0)
    return (found * factor).to(tl.float16)


@triton.jit
def page_logits(
    q, q0, q1, q2, q3, r, factor, start, segment, scalars, words, row, kind, t, channels,
    D: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    REFINED: tl.constexpr, ANY_TOPK: tl.constexpr, ANY_EXCEPTIONS: tl.constexpr,
):  # fmt: skip
    """Logits of queries against the tokens `t` of one segment, plus `start` [1, R]: float32 [T, R].

    q0 .. q3 are `load_queries` of as many chunks of GROUPS groups as D has. If the segment's kind is INVALID: anything.
    """
    first = tl.broadcast_to(start, [t.shape[1], start.shape[1]])
    keys = plane_keys(segment, scalars, words, row, t, channels, 0, GROUPS, REFINED, WIDTH)
    logits = tl.dot(keys, q0, first)
    if D > GROUPS * 16:
        keys = plane_keys(segment, scalars, words, row, t, channels, 1, GROUPS, REFINED, WIDTH)
        logits = tl.dot(keys, q1, logits)
    if D > 2 * GROUPS * 16:
        keys = plane_keys(segment, scalars, words, row, t, channels, 2, GROUPS, REFINED, WIDTH)
        logits = tl.dot(keys, q2, logits)
        keys = plane_keys(segment, scalars, words, row, t, channels, 3, GROUPS, REFINED, WIDTH)
        logits = tl.dot(keys, q3, logits)
    if ANY_TOPK or ANY_EXCEPTIONS:
        c = tl.arange(0, D)[:, None]
        mask = (r < GROUP)[None, :] & (c < channels)
        plain = tl.load(q + r[None, :] * DIM + c, mask=mask, other=0) * factor
    if ANY_TOPK:
        if kind == TOPK:
            codes, token_scale = topk_codes(segment, scalars, row, t, channels, 0, D, DIM)
            logits = tl.dot(tl.trans(codes), plain.to(tl.float16)) * tl.trans(token_scale) + start
    if ANY_EXCEPTIONS:
        for e in range(exceptions(scalars, row, kind)):
            here = tl.trans(t) == exception_token(segment, scalars, row, e)
            exact = tl.sum(plain * exception_key(segment, scalars, row, e, channels, D, DIM), 0)
            logits = tl.where(here, exact[None, :] + start, logits)
    return logits


@triton.jit
def page_values(
    weights, segment, scalars, words, levels, row, kind, t,
    D: tl.constexpr, DIM: tl.constexpr, ANY_TOPK: tl.constexpr, ANY_EXCEPTIONS: tl.constexpr,
):  # fmt: skip
    """Sums float32 [D, R] of the tokens' values by weights [T, R]."""
    if ANY_EXCEPTIONS:
        exact = tl.zeros([D, weights.shape[1]], tl.float32)
        for e in range(exceptions(scalars, row, kind)):
            here = tl.trans(t) == exception_token(segment, scalars, row, e)
            weight = tl.sum(tl.where(here, weights, 0.0), 0)
            exact += exception_value(segment, scalars, row, e, D, DIM) * weight[None, :]
            weights = tl.where(here, 0.0, weights)
    values, token_scale = plane_values(segment, scalars, words, levels, row, t, D, DIM)
    summed = tl.dot(values, _scaled(weights, token_scale))
    coded = value_channels(scalars, row)
    if coded < DIM:
        means = tl.where(tl.arange(0, D)[:, None] < coded, 0.0, mean_values(segment, scalars, row, D, DIM))
        summed += means * tl.sum(weights, 0)[None, :]
    if ANY_TOPK:
        if kind == TOPK:
            codes, token_scale = topk_codes(segment, scalars, row, t, DIM, 1, D, DIM)
            summed = tl.dot(codes, _scaled(weights, token_scale))
    if ANY_EXCEPTIONS:
        summed += exact
    return summed


@triton.jit
def _scaled(weights, token_scale):
    # Exceptions have no weight left and any scale.
    return tl.where(weights == 0, 0.0, weights * tl.trans(token_scale)).to(tl.float16)


@triton.jit
def attend_pages_kernel(
    q, data, frame_bytes, frames, pieces, epochs, starts, scalars, k_words, v_words, v_levels, out, lse, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, FORMATS: tl.constexpr, T: tl.constexpr,
    DK: tl.constexpr, K_DIM: tl.constexpr, DV: tl.constexpr, V_DIM: tl.constexpr,
    ANY_TOPK: tl.constexpr, ANY_EXCEPTIONS: tl.constexpr,
):  # fmt: skip
    """One program: a piece and a KV head. q [items, HEADS, GROUP, K_DIM]; out [pieces, HEADS, GROUP, V_DIM]."""
    piece, head = tl.program_id(0), tl.program_id(1)
    item, first, last = load_piece(pieces, piece)
    if item < 0:
        return
    of_head = tl.load(epochs + item) * HEADS + head
    start = tl.load(starts + of_head)
    r, t = tl.arange(0, ROWS), tl.arange(0, T)[None, :]
    v_channel = tl.arange(0, DV)[:, None]
    q += (item * HEADS + head) * GROUP * K_DIM
    GROUPS: tl.constexpr = min(DK // 16, 4)
    factor = scale * LOG2_E
    q0 = load_queries(q, r, factor, K_DIM, 0, GROUPS, GROUP, K_DIM)
    q1 = load_queries(q, r, factor, K_DIM, 1, GROUPS, GROUP, K_DIM)
    q2 = load_queries(q, r, factor, K_DIM, 2, GROUPS, GROUP, K_DIM)
    q3 = load_queries(q, r, factor, K_DIM, 3, GROUPS, GROUP, K_DIM)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    # Summed over the tokens at the end only.
    total = tl.zeros([T, ROWS], tl.float32)
    summed = tl.zeros([DV, ROWS], tl.float32)
    nothing = tl.zeros([1, ROWS], tl.float32)
    for page in range(first, last):
        segment = data + tl.load(frames + page).to(tl.int64) * frame_bytes + start
        row, kind = find_row(segment, scalars, of_head * FORMATS, FORMATS, ANY_TOPK, ANY_EXCEPTIONS)
        logits = page_logits(
            q, q0, q1, q2, q3, r, factor, nothing, segment, scalars, k_words, row, kind, t, K_DIM,
            DK, GROUPS, GROUP, K_DIM, DK, True, ANY_TOPK, ANY_EXCEPTIONS,
        )  # fmt: skip
        # NaN marks what was never encoded: wrong data must not pass for an answer.
        logits = tl.where(kind == INVALID, float("nan"), logits)
        new_top = tl.maximum(top, tl.max(logits, 0))
        weights = tl.exp2(logits - new_top[None, :])
        decay = tl.exp2(top - new_top)
        total = total * decay[None, :] + weights
        summed = summed * decay[None, :] + page_values(
            weights, segment, scalars, v_words, v_levels, row, kind, t, DV, V_DIM, ANY_TOPK, ANY_EXCEPTIONS
        )
        top = new_top
    total = tl.sum(total, 0)
    at = (piece * HEADS + head) * GROUP + r
    inside = (r < GROUP)[None, :] & (v_channel < V_DIM)
    tl.store(out + at[None, :] * V_DIM + v_channel, summed / total[None, :], inside)
    tl.store(lse + at, (top + tl.log2(total)) / LOG2_E, r < GROUP)
