"""Device code: pieces into items, and items and dense pages into the output, V turned back."""

import triton
import triton.language as tl

from mosaic_kernels.merge_lse.kernel import merge
from mosaic_kernels.merge_pieces import add_pieces, join_pieces, no_pieces


@triton.jit
def join_items_kernel(
    out_a, lse_a, first_a, out_b, lse_b, first_b, epochs, joined, joined_lse, heads,
    V_DIM: tl.constexpr, COLUMNS: tl.constexpr, PIECES: tl.constexpr, TWO: tl.constexpr,
):  # fmt: skip
    """One program: an item, a query head and COLUMNS of V. out_* [pieces, heads, V_DIM] -> joined [items, heads,
    V_DIM]."""
    item, head = tl.program_id(0), tl.program_id(1)
    if tl.load(epochs + item) < 0:
        return
    d = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    top, total, summed = no_pieces(PIECES, COLUMNS)
    first, last = tl.load(first_a + item), tl.load(first_a + item + 1)
    top, total, summed = add_pieces(top, total, summed, out_a, lse_a, first, last, head, heads, d, V_DIM, PIECES)
    if TWO:
        first, last = tl.load(first_b + item), tl.load(first_b + item + 1)
        top, total, summed = add_pieces(top, total, summed, out_b, lse_b, first, last, head, heads, d, V_DIM, PIECES)
    mean, lse = join_pieces(top, total, summed)
    row = item * heads + head
    tl.store(joined + row * V_DIM + d, mean, mask=d < V_DIM)
    tl.store(joined_lse + row, lse)


@triton.jit
def combine_kernel(
    joined, joined_lse, dense_out, dense_lse, unrotate, first_item, epochs, result,
    HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, DV: tl.constexpr, V_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: a request, a KV head and COLUMNS of V. joined [items, HEADS, GROUP, V_DIM]; dense_out [requests, Hq,
    V_DIM]; ROWS is what a tensor core multiplies."""
    request, head = tl.program_id(0), tl.program_id(1)
    r, c = tl.arange(0, ROWS), tl.arange(0, DV)
    to = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    real = r < GROUP
    inside = real[:, None] & (to < V_DIM)[None, :]
    dense_at = (request * HEADS + head) * GROUP + r
    out = tl.load(dense_out + dense_at[:, None] * V_DIM + to[None, :], mask=inside, other=0).to(tl.float32)
    lse = tl.load(dense_lse + dense_at, mask=real, other=float("-inf")).to(tl.float32)
    for item in range(tl.load(first_item + request), tl.load(first_item + request + 1)):
        row = (item * HEADS + head) * GROUP + r
        mine = tl.load(joined + row[:, None] * V_DIM + c[None, :], mask=real[:, None] & (c < V_DIM)[None, :], other=0)
        found = tl.load(joined_lse + row, mask=real, other=float("-inf"))
        basis = unrotate + (tl.load(epochs + item) * HEADS + head) * V_DIM * V_DIM
        square = (c < V_DIM)[:, None] & (to < V_DIM)[None, :]
        turn = tl.load(basis + c[:, None] * V_DIM + to[None, :], mask=square, other=0)
        out, lse = merge(out, lse, tl.dot(mine, turn, input_precision="tf32x3"), found)
    tl.store(result + dense_at[:, None] * V_DIM + to[None, :], out.to(result.dtype.element_ty), mask=inside)
