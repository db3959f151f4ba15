"""Device code: log-sum-exp of what an item selected, kept for later steps or compared with what was kept."""

import triton
import triton.language as tl


@triton.jit
def far_share_kernel(
    lse, first_piece, kept, far_lse, far_first_piece, rows,
    PIECES: tl.constexpr, COLUMNS: tl.constexpr, FOLLOW: tl.constexpr,
):  # fmt: skip
    """One program: an item and COLUMNS of its query heads, PIECES pieces side by side. lse, far_lse [pieces, rows];
    kept [items, rows]. FOLLOW: what the item selected has grown by so much since, and so does its far field."""
    item = tl.program_id(0)
    row = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = row < rows
    top = tl.full([PIECES, COLUMNS], float("-inf"), tl.float32)
    total = tl.zeros([PIECES, COLUMNS], tl.float32)
    first, last = tl.load(first_piece + item), tl.load(first_piece + item + 1)
    for at in range(first, last, PIECES):
        piece = at + tl.arange(0, PIECES)
        mask = (piece < last)[:, None] & there[None, :]
        found = tl.load(lse + piece[:, None] * rows + row[None, :], mask=mask, other=float("-inf"))
        higher = tl.maximum(top, found)
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(top - shift) + tl.exp(found - shift)
        top = higher
    highest = tl.max(top, 0)
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    now = shift + tl.log(tl.sum(total * tl.exp(top - shift[None, :]), 0))
    mine = kept + item * rows + row
    if FOLLOW:
        before = tl.load(mine, mask=there, other=0)
        # Where nothing was selected there is nothing to compare.
        known = (tl.abs(now) < float("inf")) & (tl.abs(before) < float("inf"))
        drift = tl.where(known, now - before, 0.0)
        first, last = tl.load(far_first_piece + item), tl.load(far_first_piece + item + 1)
        for at in range(first, last, PIECES):
            piece = at + tl.arange(0, PIECES)
            mask = (piece < last)[:, None] & there[None, :]
            far = far_lse + piece[:, None] * rows + row[None, :]
            tl.store(far, tl.load(far, mask=mask, other=0) + drift[None, :], mask=mask)
    else:
        tl.store(mine, now, mask=there)
