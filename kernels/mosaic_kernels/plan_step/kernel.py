"""Device code of a step's plan: count the pages of every kind, then list them and cut them into pieces."""

import triton
import triton.language as tl

from mosaic_kernels import page_batch

SIZES, SPARE_SHARE = tl.constexpr(page_batch.SIZES), tl.constexpr(page_batch.SPARE_SHARE)


@triton.jit
def _find_pages(req_to_token, row, page, pages, page_table, slots, first_mosaic, T: tl.constexpr, EPOCHS: tl.constexpr):
    """Kind (slot of its epoch; EPOCHS: not compressed; beyond: no page) and row of the pages [N] of a request."""
    there = page < pages
    token = tl.load(req_to_token + row + page.to(tl.int64) * T, mask=there, other=0)
    frame = tl.load(page_table + token // T, mask=there, other=0)
    mosaic = frame >= first_mosaic
    slot = tl.load(slots + (frame - first_mosaic), mask=there & mosaic, other=-1)
    kind = tl.where(slot >= 0, slot, EPOCHS)
    # What has no bytes stands for padding, which nobody reads.
    of_kind = tl.where(slot >= 0, frame - first_mosaic, tl.where(mosaic | (frame < 0), 0, frame))
    return tl.where(there, kind, EPOCHS + 1), of_kind.to(tl.int32)


@triton.jit
def count_pages_kernel(
    req_to_token, row_stride, requests, lengths, page_table, slots, first_mosaic, counts,
    T: tl.constexpr, EPOCHS: tl.constexpr, KINDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: a request. counts int32 [requests, EPOCHS + 1]; KINDS is EPOCHS + 1 filled up to a power of two."""
    r = tl.program_id(0)
    row = tl.load(requests + r).to(tl.int64) * row_stride
    pages = (tl.load(lengths + r).to(tl.int32) + T - 1) // T
    every = tl.arange(0, KINDS)
    found = tl.zeros([KINDS], tl.int32)
    for at in range(0, pages, BLOCK):
        page = at + tl.arange(0, BLOCK)
        kind, _ = _find_pages(req_to_token, row, page, pages, page_table, slots, first_mosaic, T, EPOCHS)
        found += tl.sum((kind[:, None] == every[None, :]).to(tl.int32), 0)
    tl.store(counts + r * (EPOCHS + 1) + every, found, mask=every <= EPOCHS)


@triton.jit
def _piece_size(lengths, heads, programs, least):
    """As `page_batch.piece_size`; lengths int32 [N], 0 for none."""
    even = tl.maximum((tl.sum(lengths) * heads + programs - 1) // programs, least)
    size = even
    for _ in tl.static_range(SIZES):
        count = tl.sum((lengths + size - 1) // size) * heads
        longer = tl.maximum((size * count + programs - 1) // programs, size + 1)
        size = tl.where(count > programs, longer, size)
    return tl.where(size <= even + even // SPARE_SHARE, size, even)


@triton.jit
def _cut(pieces, at, owner, first, length, size, BLOCK: tl.constexpr):
    """Writes the pieces of a list of `length` from `first` on; how many."""
    count = (length + size - 1) // size
    for start in range(0, count, BLOCK):
        n = start + tl.arange(0, BLOCK)
        to, there = pieces + (at + n) * 3, n < count
        tl.store(to, tl.zeros_like(n) + owner, mask=there)
        tl.store(to + 1, first + length * n // count, mask=there)
        tl.store(to + 2, first + length * (n + 1) // count, mask=there)
    return count


@triton.jit
def _clear(pieces, count, capacity, r, requests, BLOCK: tl.constexpr):
    """No pieces from `count` on; every program clears some."""
    for start in range(r * BLOCK, capacity, requests * BLOCK):
        n = start + tl.arange(0, BLOCK)
        tl.store(pieces + n * 3, tl.full([BLOCK], -1, tl.int32), mask=(n >= count) & (n < capacity))


@triton.jit
def _list(
    req_to_token, row, pages, page_table, slots, first_mosaic, to, KIND,
    T: tl.constexpr, EPOCHS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes the rows of a request's pages of one kind."""
    for at in range(0, pages, BLOCK):
        page = at + tl.arange(0, BLOCK)
        kind, of_kind = _find_pages(req_to_token, row, page, pages, page_table, slots, first_mosaic, T, EPOCHS)
        mine = kind == KIND
        tl.store(to + tl.cumsum(mine.to(tl.int32), 0) - 1, of_kind, mask=mine)
        to += tl.sum(mine.to(tl.int32))


@triton.jit
def _most_selected(tokens, share, least_selected, SHARE_BITS: tl.constexpr):
    chosen = (tokens.to(tl.int64) * share >> SHARE_BITS).to(tl.int32)
    chosen = tl.where(tokens < least_selected, tokens, tl.maximum(chosen, 1))
    return tl.where(tokens > 0, chosen, 0)


@triton.jit
def place_pages_kernel(
    req_to_token, row_stride, requests, lengths, page_table, slots, first_mosaic, counts,
    frames, epochs, owners, pieces, first_page, first_piece, first_item,
    most, first_token, token_pieces, first_token_piece,
    dense_frames, dense_first_page, dense_tokens, dense_pieces, dense_first_piece,
    capacity, heads, programs, dense_programs, least_pages, share, least_selected,
    T: tl.constexpr, EPOCHS: tl.constexpr, N: tl.constexpr, SELECT: tl.constexpr, SHARE_BITS: tl.constexpr,
    BLOCK: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """One program: a request. Everything is written as `step.StepPlan` says; N holds requests x EPOCHS."""
    r, count = tl.program_id(0), tl.num_programs(0)
    last = r == count - 1
    length = tl.load(lengths + r).to(tl.int32)
    row = tl.load(requests + r).to(tl.int64) * row_stride
    pages = (length + T - 1) // T
    # Compressed pages of all: what lies before this request, and how long pieces are.
    n = tl.arange(0, N)
    of_item = tl.load(counts + n // EPOCHS * (EPOCHS + 1) + n % EPOCHS, mask=n < count * EPOCHS, other=0)
    before = n < r * EPOCHS
    size = _piece_size(of_item, heads, programs, least_pages)
    in_pieces = (of_item + size - 1) // size
    item = tl.sum((before & (of_item > 0)).to(tl.int32))
    first = tl.sum(tl.where(before, of_item, 0))
    piece = tl.sum(tl.where(before, in_pieces, 0))
    items = tl.sum((of_item > 0).to(tl.int32))
    tl.store(first_item + r, item)
    _clear(pieces, tl.sum(in_pieces), capacity, r, count, CUT)
    if SELECT:
        chosen = _most_selected(of_item * T, share, least_selected, SHARE_BITS)
        token_size = _piece_size(chosen, heads, programs, T)
        in_token_pieces = (chosen + token_size - 1) // token_size
        token = tl.sum(tl.where(before, chosen, 0))
        token_piece = tl.sum(tl.where(before, in_token_pieces, 0))
        _clear(token_pieces, tl.sum(in_token_pieces), capacity, r, count, CUT)
    for epoch in range(EPOCHS):
        own = tl.load(counts + r * (EPOCHS + 1) + epoch)
        if own > 0:
            _list(
                req_to_token, row, pages, page_table, slots, first_mosaic, frames + first, epoch, T, EPOCHS, BLOCK
            )  # fmt: skip
            tl.store(epochs + item, epoch)
            tl.store(owners + item, r)
            tl.store(first_page + item, first)
            tl.store(first_piece + item, piece)
            piece += _cut(pieces, piece, item, first, own, size, CUT)
            first += own
            if SELECT:
                wanted = _most_selected(own * T, share, least_selected, SHARE_BITS)
                tl.store(most + item, wanted)
                tl.store(first_token + item, token)
                tl.store(first_token_piece + item, token_piece)
                token_piece += _cut(token_pieces, token_piece, item, token, wanted, token_size, CUT)
                token += wanted
            item += 1
    if last:
        tl.store(first_item + count, item)
        tl.store(first_page + item, first)
        tl.store(first_piece + item, piece)
        if SELECT:
            tl.store(first_token + item, token)
            tl.store(first_token_piece + item, token_piece)
        tl.store(epochs + n, tl.full([N], -1, tl.int32), mask=(n >= items) & (n < count * EPOCHS))
    # The others.
    m = tl.arange(0, N)
    of_request = tl.load(counts + m * (EPOCHS + 1) + EPOCHS, mask=m < count, other=0)
    size = _piece_size(of_request, heads, dense_programs, 1)
    in_pieces = (of_request + size - 1) // size
    first = tl.sum(tl.where(m < r, of_request, 0))
    piece = tl.sum(tl.where(m < r, in_pieces, 0))
    own = tl.load(counts + r * (EPOCHS + 1) + EPOCHS)
    _clear(dense_pieces, tl.sum(in_pieces), capacity, r, count, CUT)
    _list(
        req_to_token, row, pages, page_table, slots, first_mosaic, dense_frames + first, EPOCHS, T, EPOCHS, BLOCK
    )  # fmt: skip
    tl.store(dense_first_page + r, first)
    tl.store(dense_first_piece + r, piece)
    tl.store(dense_tokens + r, tl.maximum(own * T - (pages * T - length), 0))
    piece += _cut(dense_pieces, piece, r, first, own, size, CUT)
    if last:
        tl.store(dense_first_page + count, first + own)
        tl.store(dense_first_piece + count, piece)
