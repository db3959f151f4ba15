"""Device code of selection: count keys, find the threshold, collect the tokens above it."""

import triton
import triton.language as tl

from mosaic_kernels.load_piece import load_piece
from mosaic_kernels.scan import keys as of_keys

KEYS = tl.constexpr(of_keys.KEYS)
STEPS = tl.constexpr(of_keys.STEPS)
LOWEST = tl.constexpr(of_keys.LOWEST)


@triton.jit
def _chosen_by(keys, token, there, key, T: tl.constexpr, SHARED: tl.constexpr):
    """What tokens are chosen by whose own keys are `key`, for SHARED steps."""
    for back in tl.static_range(1, SHARED):
        before = tl.load(keys + token - back, mask=there & (token % T >= back), other=0).to(tl.int32)
        key = tl.maximum(key, before)
    return key


@triton.jit
def count_kernel(
    keys, pieces, counts, totals, pages,
    HEADS: tl.constexpr, T: tl.constexpr, SHARED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program: a piece and a KV head. keys int16 [HEADS, pages, T] -> counts int32 [pieces, HEADS, KEYS], and added
    to totals int32 [items, HEADS, KEYS]."""
    piece, head = tl.program_id(0), tl.program_id(1)
    item, first, last = load_piece(pieces, piece)
    if item < 0:
        return
    first, last = first * T, last * T
    mine = keys + head.to(tl.int64) * pages * T
    found = tl.zeros([KEYS], tl.int32)
    for at in range(first, last, TILE):
        token = at + tl.arange(0, TILE)
        there = token < last
        key = tl.load(mine + token, mask=there, other=0).to(tl.int32)
        found += tl.histogram(_chosen_by(mine, token, there, key, T, SHARED), KEYS, mask=there)
    key = tl.arange(0, KEYS)
    tl.store(counts + (piece * HEADS + head) * KEYS + key, found)
    tl.atomic_add(totals + (item * HEADS + head) * KEYS + key, found, mask=found > 0, sem="relaxed")


@triton.jit
def threshold_kernel(
    counts, totals, pieces, most, least, spares, above, ties, top_p, HEADS: tl.constexpr, TOP_P: tl.constexpr
):
    """One program: a piece and a KV head.

    least and spares int32 [pieces, HEADS], alike for all pieces of an item: the least key of which all tokens are
    taken, and how many of the next. above and ties int32 [pieces, HEADS]: how many of both the piece has.
    """
    piece, head = tl.program_id(0), tl.program_id(1)
    item = tl.load(pieces + piece * 3)
    if item < 0:
        return
    key = tl.arange(0, KEYS)
    total = tl.load(totals + (item * HEADS + head) * KEYS + key)
    limit = tl.load(most + item)
    at_least = tl.cumsum(total, 0, reverse=True)
    bound = tl.sum((at_least > limit).to(tl.int32))
    spare = limit - tl.sum(tl.where(key >= bound, total, 0))
    if TOP_P:
        mass = tl.cumsum(total * tl.exp(key.to(tl.float32) / STEPS + LOWEST), 0, reverse=True)
        wanted = top_p * (1 + tl.max(mass)) - 1
        enough = tl.where(wanted > 0, tl.sum((mass >= wanted).to(tl.int32)) - 1, KEYS)
        spare = tl.where(enough >= bound, 0, spare)
        bound = tl.maximum(bound, enough)
    at = piece * HEADS + head
    mine = tl.load(counts + at * KEYS + key)
    tl.store(least + at, bound)
    tl.store(spares + at, spare)
    tl.store(above + at, tl.sum(tl.where(key >= bound, mine, 0)))
    tl.store(ties + at, tl.sum(tl.where(key == bound - 1, mine, 0)))


@triton.jit
def collect_kernel(
    keys, page_lse, pieces, first_piece, epochs, first_token, least, spares, above, ties, far_bias,
    tokens, taken, far, pages, room, items,
    HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, T: tl.constexpr, SHARED: tl.constexpr,
    PAGES: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """One program: a piece and a KV head. tokens int32 [HEADS, room]; taken int32 [HEADS, items], added to; far float32
    [HEADS, pages, GROUP]."""
    piece, head = tl.program_id(0), tl.program_id(1)
    item, first, last = load_piece(pieces, piece)
    if item < 0:
        return
    own = piece * HEADS + head
    bound, spare = tl.load(least + own), tl.load(spares + own)
    # What the item's pieces before this one take. Equal keys are taken in order, as long as there is room.
    higher, equal = tl.zeros([PIECES], tl.int32), tl.zeros([PIECES], tl.int32)
    for at in range(tl.load(first_piece + item), piece, PIECES):
        other = at + tl.arange(0, PIECES)
        higher += tl.load(above + other * HEADS + head, mask=other < piece, other=0)
        equal += tl.load(ties + other * HEADS + head, mask=other < piece, other=0)
    used = tl.minimum(tl.sum(equal), spare)
    begin, spare = tl.sum(higher) + used, tl.minimum(spare - used, tl.load(ties + own))
    tl.atomic_add(taken + head * items + item, tl.load(above + own) + spare, sem="relaxed")
    bias = tl.load(far_bias + tl.load(epochs + item) * HEADS + head)
    to = tokens + head.to(tl.int64) * room + tl.load(first_token + item) + begin
    of_head = head.to(tl.int64) * pages
    r = tl.arange(0, ROWS)[None, :]
    for at in range(first, last, PAGES):
        page = at + tl.arange(0, PAGES)[:, None]
        real = page < last
        token = page * T + tl.arange(0, T)[None, :]
        key = tl.load(keys + of_head * T + token, mask=real, other=0).to(tl.int32)
        by = _chosen_by(keys + of_head * T, token, real, key, T, SHARED)
        tie = real & (by == bound - 1)
        flat = tl.reshape(tie.to(tl.int32), [PAGES * T])
        before = tl.reshape(tl.cumsum(flat, 0), [PAGES, T])
        take = real & (by >= bound) | tie & (before <= spare)
        spare -= tl.sum(flat)
        flat = tl.reshape(take.to(tl.int32), [PAGES * T])
        tl.store(to + tl.reshape(tl.cumsum(flat, 0), [PAGES, T]) - 1, token, mask=take)
        to += tl.sum(flat)
        mass = tl.exp(key.to(tl.float32) / STEPS + LOWEST)
        left = tl.log(tl.sum(tl.where(take, 0.0, mass), 1) / tl.sum(mass, 1))[:, None] + bias
        lse_at = (of_head + page) * GROUP + r
        lse = tl.load(page_lse + lse_at, mask=real & (r < GROUP), other=0)
        tl.store(far + lse_at, lse + left, mask=real & (r < GROUP))
