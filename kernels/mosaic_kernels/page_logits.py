"""Device code: logits of queries against all tokens of a page of planes, in integers."""

import triton
import triton.language as tl

from mosaic_kernels.digits import MOST, from_digits, inverse_of, load_query, query_digits, scale_query
from mosaic_kernels.load_bytes import fetch_bytes, key_bytes
from mosaic_kernels.load_segment import INVALID


@triton.jit
def load_chunks(q, r, factor, channels, D: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr):
    """Queries times a factor, of up to four chunks of 64 of D channels (`load_query`). Of chunks that D does not have,
    anything."""
    q0 = load_query(q, r, factor, channels, 0, GROUP, DIM)
    q1, q2, q3 = q0, q0, q0
    if D > 64:
        q1 = load_query(q, r, factor, channels, 1, GROUP, DIM)
    if D > 128:
        q2 = load_query(q, r, factor, channels, 2, GROUP, DIM)
        q3 = load_query(q, r, factor, channels, 3, GROUP, DIM)
    return q0, q1, q2, q3


@triton.jit
def page_logits(
    chunks, segment, scalars, words, row, kind, t, channels,
    REFINED: tl.constexpr, D: tl.constexpr, R: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Logits of queries (`load_chunks`) against tokens `t` int32 [1, T] of a page, float32 [T, R]; NaN where it was
    never encoded.

    segment, row: [1, 1]; kind: scalar. Of the first `channels` of K, of D of WIDTH; without refinement a code is the
    middle of those that share its base.
    """
    q0, most, rest = scale_query(chunks[0], segment, scalars, words, row, channels, 0, REFINED, WIDTH)
    q1, q2, q3 = q0, q0, q0
    if D > 64:
        q1, other, more = scale_query(chunks[1], segment, scalars, words, row, channels, 1, REFINED, WIDTH)
        most, rest = tl.maximum(most, other), rest + more
    if D > 128:
        q2, other, more = scale_query(chunks[2], segment, scalars, words, row, channels, 2, REFINED, WIDTH)
        most, rest = tl.maximum(most, other), rest + more
        q3, other, more = scale_query(chunks[3], segment, scalars, words, row, channels, 3, REFINED, WIDTH)
        most, rest = tl.maximum(most, other), rest + more
    most = tl.max(most, 0)
    inverse = inverse_of(most)
    d0 = query_digits(q0, inverse)
    d1, d2, d3 = d0, d0, d0
    if D > 64:
        d1 = query_digits(q1, inverse)
    if D > 128:
        d2, d3 = query_digits(q2, inverse), query_digits(q3, inverse)
    unit, rest = most / MOST, tl.sum(rest, 0)
    group = tl.arange(0, 4)[:, None]
    k0 = fetch_bytes(segment, words, row, group, t, REFINED, WIDTH)
    k1, k2, k3 = k0, k0, k0
    if D > 64:
        k1 = fetch_bytes(segment, words, row, group + 4, t, REFINED, WIDTH)
    if D > 128:
        k2 = fetch_bytes(segment, words, row, group + 8, t, REFINED, WIDTH)
        k3 = fetch_bytes(segment, words, row, group + 12, t, REFINED, WIDTH)
    products = tl.dot(key_bytes(k0, REFINED), d0, out_dtype=tl.int32)
    if D > 64:
        products = tl.dot(key_bytes(k1, REFINED), d1, products, out_dtype=tl.int32)
    if D > 128:
        products = tl.dot(key_bytes(k2, REFINED), d2, products, out_dtype=tl.int32)
        products = tl.dot(key_bytes(k3, REFINED), d3, products, out_dtype=tl.int32)
    logits = from_digits(products, t.shape[1], R) * unit[None, :] + rest[None, :]
    return tl.where(kind == INVALID, float("nan"), logits)
