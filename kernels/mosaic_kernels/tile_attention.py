"""Device code: logits of a tile of tokens, and flash-decoding's online softmax over tiles.

Tokens or channels lie along the first dimension and query heads along the second: tensor cores then multiply tiles of
tokens or channels, not of a handful of query heads. A tile is of one segment, or every token has a segment of its own:
`segment` are [1, 1 or T] pointers, `row` and `kind` as many, `t` int32 [1, T].

K and V are taken in chunks of up to four 16-channel groups, in which the tiles of a warp need few registers. What
belongs to a token may also be given as many times as a chunk has groups, [groups, T]: then threads have it where they
unpack the token, and nothing passes between them. Rare kinds of segments need [1, ..].
"""

import triton
import triton.language as tl

from mosaic_kernels.load_segment import (
    INVALID,
    TOPK,
    exception_key,
    exception_token,
    exception_value,
    exceptions,
    fetch_keys,
    fetch_values,
    key_channels,
    mean_values,
    plane_keys,
    plane_values,
    topk_codes,
    value_channels,
    value_scales,
)

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_queries(q, r, factor, channels, D: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr):
    """Queries times a factor, of up to four chunks of D channels: float16 [up to 64, R] each, in the order of
    `key_channels`. Of chunks that D does not have, anything.

    q: pointer to float32 [GROUP, DIM]; channels from `channels` on and rows beyond GROUP are 0.
    """
    GROUPS: tl.constexpr = min(D // 16, 4)
    q0 = _load_chunk(q, r, factor, channels, 0, GROUPS, GROUP, DIM)
    q1 = _load_chunk(q, r, factor, channels, 1, GROUPS, GROUP, DIM)
    q2 = _load_chunk(q, r, factor, channels, 2, GROUPS, GROUP, DIM)
    q3 = _load_chunk(q, r, factor, channels, 3, GROUPS, GROUP, DIM)
    return q0, q1, q2, q3


@triton.jit
def fetch_tile(
    segment, scalars, k_words, v_words, row, t,
    DK: tl.constexpr, K_DIM: tl.constexpr, DV: tl.constexpr, V_DIM: tl.constexpr,
):  # fmt: skip
    """All planes of the tokens, packed: of every chunk of K (`tile_logits`) and of V (`attend_tile`)."""
    k = fetch_key_tile(segment, scalars, k_words, row, t, K_DIM, DK, True, DK)
    GROUPS: tl.constexpr = min(DV // 16, 4)
    v0 = fetch_values(segment, v_words, row, t, 0, GROUPS, V_DIM, DV)
    v1, v2, v3 = v0, v0, v0
    if DV > 64:
        v1 = fetch_values(segment, v_words, row, t, 1, GROUPS, V_DIM, DV)
    if DV > 128:
        v2 = fetch_values(segment, v_words, row, t, 2, GROUPS, V_DIM, DV)
        v3 = fetch_values(segment, v_words, row, t, 3, GROUPS, V_DIM, DV)
    return k, (v0, v1, v2, v3), value_scales(segment, scalars, row, t)


@triton.jit
def fetch_key_tile(
    segment, scalars, words, row, t, channels, D: tl.constexpr, REFINED: tl.constexpr, WIDTH: tl.constexpr
):
    """The first `channels` of K of the tokens, packed, of every chunk of D."""
    GROUPS: tl.constexpr = min(D // 16, 4)
    k0 = fetch_keys(segment, scalars, words, row, t, channels, 0, GROUPS, REFINED, WIDTH)
    k1, k2, k3 = k0, k0, k0
    if D > 64:
        k1 = fetch_keys(segment, scalars, words, row, t, channels, 1, GROUPS, REFINED, WIDTH)
    if D > 128:
        k2 = fetch_keys(segment, scalars, words, row, t, channels, 2, GROUPS, REFINED, WIDTH)
        k3 = fetch_keys(segment, scalars, words, row, t, channels, 3, GROUPS, REFINED, WIDTH)
    return k0, k1, k2, k3


@triton.jit
def tile_logits(
    k, q, chunks, r, factor, start, segment, scalars, row, kind, t, channels,
    D: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
    REFINED: tl.constexpr, ANY_TOPK: tl.constexpr, ANY_EXCEPTIONS: tl.constexpr,
):  # fmt: skip
    """Logits of queries against tokens, plus `start` [1, R]: float32 [T, R]; NaN where a segment was never encoded.

    k: as of `fetch_key_tile`; chunks: `load_queries` of q.
    """
    GROUPS: tl.constexpr = min(D // 16, 4)
    logits = tl.broadcast_to(start, [t.shape[1], start.shape[1]])
    logits = tl.dot(plane_keys(k[0], GROUPS, REFINED), chunks[0], logits)
    if D > 64:
        logits = tl.dot(plane_keys(k[1], GROUPS, REFINED), chunks[1], logits)
    if D > 128:
        logits = tl.dot(plane_keys(k[2], GROUPS, REFINED), chunks[2], logits)
        logits = tl.dot(plane_keys(k[3], GROUPS, REFINED), chunks[3], logits)
    if ANY_TOPK or ANY_EXCEPTIONS:
        c = tl.arange(0, D)[:, None]
        plain = tl.load(q + r[None, :] * DIM + c, mask=(r < GROUP)[None, :] & (c < channels), other=0) * factor
    if ANY_TOPK:
        sparse = kind == TOPK
        if any_of(sparse):
            codes, token_scale = topk_codes(segment, scalars, row, t, channels, 0, D, DIM)
            found = tl.dot(tl.trans(codes), plain.to(tl.float16)) * tl.trans(token_scale)
            logits = tl.where(tl.trans(sparse), found + start, logits)
    if ANY_EXCEPTIONS:
        kept = exceptions(scalars, row, kind)
        for e in range(tl.max(kept)):
            here = (e < kept) & (t == exception_token(segment, scalars, row, e))
            exact = tl.where(here, exception_key(segment, scalars, row, e, channels, D, DIM), 0.0)
            found = tl.dot(tl.trans(exact), plain, input_precision="ieee")
            logits = tl.where(tl.trans(here), found + start, logits)
    return tl.where(of_tokens(kind) == INVALID, float("nan"), logits)


@triton.jit
def attend_tile(
    v, token_scales, top, total, s0, s1, s2, s3, rare, logits, segment, scalars, row, kind, t,
    D: tl.constexpr, DIM: tl.constexpr, ANY_TOPK: tl.constexpr, ANY_EXCEPTIONS: tl.constexpr,
):  # fmt: skip
    """Adds tokens of logits [T, R], base 2, -inf for those that do not count, to a softmax.

    v, token_scales: as of `fetch_tile`. The softmax has a maximum [R], sums of weights [T, R], and sums of values [up
    to 64 channels, R] in as many chunks as D has; what segments of rare kinds give is summed in `rare` [D, R].
    """
    top, total, weights, decay = weigh(top, total, logits)
    if ANY_TOPK or ANY_EXCEPTIONS:
        rare = rare * decay
    if ANY_TOPK:
        sparse = kind == TOPK
        if any_of(sparse):
            codes, token_scale = topk_codes(segment, scalars, row, t, DIM, 1, D, DIM)
            rare += tl.dot(codes, scaled_weights(tl.where(tl.trans(sparse), weights, 0.0), token_scale))
            weights = tl.where(tl.trans(sparse), 0.0, weights)
    if ANY_EXCEPTIONS:
        kept = exceptions(scalars, row, kind)
        for e in range(tl.max(kept)):
            here = (e < kept) & (t == exception_token(segment, scalars, row, e))
            exact = tl.where(here, exception_value(segment, scalars, row, e, D, DIM), 0.0)
            rare += tl.dot(exact, tl.where(tl.trans(here), weights, 0.0), input_precision="ieee")
            weights = tl.where(tl.trans(here), 0.0, weights)
    scaled = scaled_weights(weights, token_scales)
    s0 = _add_chunk(s0 * decay, v[0], scaled, weights, segment, scalars, row, 0, D, DIM)
    if D > 64:
        s1 = _add_chunk(s1 * decay, v[1], scaled, weights, segment, scalars, row, 1, D, DIM)
    if D > 128:
        s2 = _add_chunk(s2 * decay, v[2], scaled, weights, segment, scalars, row, 2, D, DIM)
        s3 = _add_chunk(s3 * decay, v[3], scaled, weights, segment, scalars, row, 3, D, DIM)
    return top, total, s0, s1, s2, s3, rare


@triton.jit
def weigh(top, total, logits):
    """The maximum with logits [T, R] and the sums with their weights; those, and the factor [1, R] of earlier sums."""
    new_top = tl.maximum(top, tl.max(logits, 0))
    shift = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(logits - shift[None, :])
    decay = tl.exp2(top - shift)[None, :]
    return new_top, total * decay + weights, weights, decay


@triton.jit
def store_softmax(
    out, lse, r, top, total, s0, s1, s2, s3, rare,
    GROUP: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr, RARE: tl.constexpr,
):  # fmt: skip
    """Output [GROUP, DIM] and natural log-sum-exp [GROUP] of a softmax; of one over nothing 0 and -inf."""
    total = tl.sum(total, 0)
    if D <= 64:
        summed = s0
    elif D <= 128:
        summed = tl.reshape(tl.permute(tl.join(s0, s1), 2, 0, 1), [D, s0.shape[1]])
    else:
        # [64, R, chunk % 2, chunk / 2]
        joined = tl.join(tl.join(s0, s1), tl.join(s2, s3))
        summed = tl.reshape(tl.permute(joined, 3, 2, 0, 1), [D, s0.shape[1]])
    if RARE:
        summed += rare
    summed = tl.where((total > 0)[None, :], summed / total[None, :], summed)
    c = tl.arange(0, D)[:, None]
    tl.store(out + r[None, :] * DIM + c, summed, (r < GROUP)[None, :] & (c < DIM))
    tl.store(lse + r, (top + tl.log2(total)) / LOG2_E, r < GROUP)


@triton.jit
def scaled_weights(weights, scale):
    """Weights [T, R] times a scale of each token: float16; what has no weight may have any scale."""
    return tl.where(weights == 0, 0.0, weights * of_tokens(scale)).to(tl.float16)


@triton.jit
def of_tokens(x):
    """[1 or groups, 1 or T], all rows alike -> [1 or T, 1]."""
    return tl.trans(x) if x.shape[0] == 1 else tl.max(x, 0)[:, None]


@triton.jit
def any_of(x):
    """Whether any of a tensor is true."""
    return tl.max(x.to(tl.int32)) > 0


@triton.jit
def _load_chunk(
    q, r, factor, channels, CHUNK: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr
):
    c = key_channels(CHUNK, GROUPS)[:, None]
    found = tl.load(q + r[None, :] * DIM + c, mask=(r < GROUP)[None, :] & (c < channels), other=0)
    return (found * factor).to(tl.float16)


@triton.jit
def _add_chunk(
    summed, fetched, scaled, weights, segment, scalars, row, CHUNK: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr
):
    GROUPS: tl.constexpr = min(D // 16, 4)
    summed = tl.dot(plane_values(fetched, GROUPS), scaled, summed)
    coded = tl.trans(of_tokens(value_channels(scalars, row)))
    if tl.min(coded) < DIM:
        units, scale = mean_values(segment, scalars, row, CHUNK, GROUPS, DIM)
        units = tl.where(CHUNK * GROUPS * 16 + tl.arange(0, GROUPS * 16)[:, None] < coded, 0.0, units).to(tl.float16)
        if units.shape[1] == 1:
            summed += units.to(tl.float32) * (tl.sum(weights, 0)[None, :] * scale)
        else:
            summed = tl.dot(units, scaled_weights(weights, scale), summed)
    return summed
