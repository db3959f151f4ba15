"""Device code of selection: count keys, find the threshold, collect the tokens above it."""

import triton
import triton.language as tl

from mosaic_kernels.load_piece import load_piece
from mosaic_kernels.scan import keys as of_keys

KEYS = tl.constexpr(of_keys.KEYS)
STEPS = tl.constexpr(of_keys.STEPS)
LOWEST = tl.constexpr(of_keys.LOWEST)


@triton.jit
def count_kernel(keys, pieces, counts, pages, HEADS: tl.constexpr, T: tl.constexpr, TILE: tl.constexpr):
    """One program: a piece and a KV head. keys int16 [HEADS, pages, T] -> counts int32 [pieces, HEADS, KEYS]."""
    piece, head = tl.program_id(0), tl.program_id(1)
    item, first, last = load_piece(pieces, piece)
    if item < 0:
        return
    first, last = first * T, last * T
    mine = keys + head.to(tl.int64) * pages * T
    found = tl.zeros([KEYS], tl.int32)
    for at in range(first, last, TILE):
        token = at + tl.arange(0, TILE)
        key = tl.load(mine + token, mask=token < last, other=0).to(tl.int32)
        found += tl.histogram(key, KEYS, mask=token < last)
    tl.store(counts + (piece * HEADS + head) * KEYS + tl.arange(0, KEYS), found)


@triton.jit
def threshold_kernel(
    counts, first_piece, most, least, starts, spares, taken, top_p,
    HEADS: tl.constexpr, PIECES: tl.constexpr, TOP_P: tl.constexpr,
):  # fmt: skip
    """One program: an item and a KV head.

    least int32 [items, HEADS]; starts and spares int32 [pieces, HEADS]: how many tokens of the item the pieces before
    take, and how many a piece takes whose key is one below `least`; taken int32 [HEADS, items].
    """
    item, head = tl.program_id(0), tl.program_id(1)
    first, last = tl.load(first_piece + item), tl.load(first_piece + item + 1)
    key = tl.arange(0, KEYS)
    total = tl.zeros([PIECES, KEYS], tl.int32)
    for at in range(first, last, PIECES):
        piece = at + tl.arange(0, PIECES)
        row = counts + ((piece * HEADS + head) * KEYS)[:, None]
        total += tl.load(row + key[None, :], mask=(piece < last)[:, None], other=0)
    total = tl.sum(total, 0)
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
    tl.store(least + item * HEADS + head, bound)
    start = 0
    for at in range(first, last, PIECES):
        piece = at + tl.arange(0, PIECES)
        real = piece < last
        mine = tl.load(counts + ((piece * HEADS + head) * KEYS)[:, None] + key[None, :], mask=real[:, None], other=0)
        equal = tl.sum(tl.where((key == bound - 1)[None, :], mine, 0), 1)
        # In order, as long as there is room.
        ties = tl.minimum(tl.maximum(spare - tl.cumsum(equal, 0) + equal, 0), equal)
        taking = tl.sum(tl.where((key >= bound)[None, :], mine, 0), 1) + ties
        tl.store(starts + piece * HEADS + head, start + tl.cumsum(taking, 0) - taking, mask=real)
        tl.store(spares + piece * HEADS + head, ties, mask=real)
        start += tl.sum(taking)
        spare -= tl.sum(ties)
    tl.store(taken + head * tl.num_programs(0) + item, start)


@triton.jit
def collect_kernel(
    keys, page_lse, pieces, epochs, first_token, least, starts, spares, far_bias, tokens, far, pages, room,
    HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, T: tl.constexpr, PAGES: tl.constexpr,
):  # fmt: skip
    """One program: a piece and a KV head. tokens int32 [HEADS, room]; far float32 [HEADS, pages, GROUP]."""
    piece, head = tl.program_id(0), tl.program_id(1)
    item, first, last = load_piece(pieces, piece)
    if item < 0:
        return
    bound, spare = tl.load(least + item * HEADS + head), tl.load(spares + piece * HEADS + head)
    bias = tl.load(far_bias + tl.load(epochs + item) * HEADS + head)
    to = tokens + head.to(tl.int64) * room + tl.load(first_token + item) + tl.load(starts + piece * HEADS + head)
    of_head = head.to(tl.int64) * pages
    r = tl.arange(0, ROWS)[None, :]
    for at in range(first, last, PAGES):
        page = at + tl.arange(0, PAGES)[:, None]
        real = page < last
        token = page * T + tl.arange(0, T)[None, :]
        key = tl.load(keys + of_head * T + token, mask=real, other=0).to(tl.int32)
        tie = real & (key == bound - 1)
        flat = tl.reshape(tie.to(tl.int32), [PAGES * T])
        before = tl.reshape(tl.cumsum(flat, 0), [PAGES, T])
        take = real & (key >= bound) | tie & (before <= spare)
        spare -= tl.sum(flat)
        flat = tl.reshape(take.to(tl.int32), [PAGES * T])
        tl.store(to + tl.reshape(tl.cumsum(flat, 0), [PAGES, T]) - 1, token, mask=take)
        to += tl.sum(flat)
        mass = tl.exp(key.to(tl.float32) / STEPS + LOWEST)
        left = tl.log(tl.sum(tl.where(take, 0.0, mass), 1) / tl.sum(mass, 1))[:, None] + bias
        lse_at = (of_head + page) * GROUP + r
        lse = tl.load(page_lse + lse_at, mask=real & (r < GROUP), other=0)
        tl.store(far + lse_at, lse + left, mask=real & (r < GROUP))
