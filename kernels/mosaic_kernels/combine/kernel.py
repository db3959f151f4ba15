"""Device code: log-sum-exp merge of pieces, items and dense pages, with V turned back."""

import triton
import triton.language as tl


@triton.jit
def _add(out, lse, found, total):
    """Attention over the union of two sets of tokens; lse -inf: an empty one, whose output does not count."""
    top = tl.maximum(lse, total)
    top = tl.where(top == float("-inf"), 0.0, top)
    here, there = tl.exp(lse - top), tl.exp(total - top)
    both = here + there
    share = tl.maximum(both, 1.0)
    out = tl.where((lse == float("-inf"))[:, None], 0.0, out) * (here / share)[:, None]
    found = tl.where((total == float("-inf"))[:, None], 0.0, found) * (there / share)[:, None]
    return out + found, top + tl.log(both)


@triton.jit
def _gather(
    top, total, summed, out, lse, first, last, head,
    HEADS: tl.constexpr, GROUP: tl.constexpr, R: tl.constexpr, DV: tl.constexpr, V_DIM: tl.constexpr,
    PIECES: tl.constexpr,
):  # fmt: skip
    """Adds pieces to PIECES sums side by side, each with its own maximum: no thread waits for another."""
    r, c = tl.arange(0, R)[None, :], tl.arange(0, DV)[None, None, :]
    for at in range(first, last, PIECES):
        piece = at + tl.arange(0, PIECES)[:, None]
        row = (piece * HEADS + head) * GROUP + r
        real = (piece < last) & (r < GROUP)
        logit = tl.load(lse + row, mask=real, other=float("-inf"))
        found = tl.load(out + row[:, :, None] * V_DIM + c, mask=real[:, :, None] & (c < V_DIM), other=0)
        new_top = tl.maximum(top, logit)
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        decay, weight = tl.exp(top - shift), tl.exp(logit - shift)
        found = tl.where((logit == float("-inf"))[:, :, None], 0.0, found)
        total = total * decay + weight
        summed = summed * decay[:, :, None] + found * weight[:, :, None]
        top = new_top
    return top, total, summed


@triton.jit
def combine_kernel(
    out_a, lse_a, first_a, out_b, lse_b, first_b, dense_out, dense_lse, unrotate, first_item, epochs, result,
    HEADS: tl.constexpr, GROUP: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, DV: tl.constexpr,
    V_DIM: tl.constexpr, PIECES: tl.constexpr, TWO: tl.constexpr,
):  # fmt: skip
    """One program: a request and a KV head. out_* [pieces, HEADS, GROUP, V_DIM]; dense_out [requests, Hq, V_DIM].

    R is the group filled up to a power of two, ROWS what a tensor core multiplies: the rows again and again.
    """
    request, head = tl.program_id(0), tl.program_id(1)
    r, c = tl.arange(0, ROWS), tl.arange(0, DV)
    real = r % R < GROUP
    inside = real[:, None] & (c < V_DIM)[None, :]
    dense_at = (request * HEADS + head) * GROUP + r % R
    out = tl.load(dense_out + dense_at[:, None] * V_DIM + c[None, :], mask=inside, other=0).to(tl.float32)
    lse = tl.load(dense_lse + dense_at, mask=real, other=float("-inf")).to(tl.float32)
    for item in range(tl.load(first_item + request), tl.load(first_item + request + 1)):
        top = tl.full([PIECES, R], float("-inf"), tl.float32)
        total = tl.zeros([PIECES, R], tl.float32)
        summed = tl.zeros([PIECES, R, DV], tl.float32)
        first, last = tl.load(first_a + item), tl.load(first_a + item + 1)
        top, total, summed = _gather(
            top, total, summed, out_a, lse_a, first, last, head, HEADS, GROUP, R, DV, V_DIM, PIECES
        )
        if TWO:
            first, last = tl.load(first_b + item), tl.load(first_b + item + 1)
            top, total, summed = _gather(
                top, total, summed, out_b, lse_b, first, last, head, HEADS, GROUP, R, DV, V_DIM, PIECES
            )
        highest = tl.max(top, 0)
        shift = tl.where(highest == float("-inf"), 0.0, highest)
        share = tl.exp(top - shift[None, :])
        total = tl.sum(total * share, 0)
        mine = tl.sum(summed * share[:, :, None], 0) / tl.where(total == 0, 1.0, total)[:, None]
        mine = tl.reshape(tl.broadcast_to(mine[None], [ROWS // R, R, DV]), [ROWS, DV])
        found = tl.reshape(tl.broadcast_to((shift + tl.log(total))[None], [ROWS // R, R]), [ROWS])
        basis = unrotate + (tl.load(epochs + item) * HEADS + head) * V_DIM * V_DIM
        square = (c < V_DIM)[:, None] & (c < V_DIM)[None, :]
        turn = tl.load(basis + c[:, None] * V_DIM + c[None, :], mask=square, other=0)
        out, lse = _add(out, lse, tl.dot(mine, turn, input_precision="tf32x3"), found)
    at = dense_at[:, None] * V_DIM + c[None, :]
    tl.store(result + at, out.to(result.dtype.element_ty), mask=inside & (r < R)[:, None])
