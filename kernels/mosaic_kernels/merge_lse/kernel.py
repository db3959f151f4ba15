"""Device code: attention over the union of two sets of tokens."""

import triton
import triton.language as tl

from mosaic_kernels.rotate_rows.kernel import turn_rows


@triton.jit
def merge(out, lse, found, total):
    """out, found [rows, columns] with log-sum-exp [rows]; -inf: an empty set, whose output does not count."""
    top = tl.maximum(lse, total)
    top = tl.where(top == float("-inf"), 0.0, top)
    here, there = tl.exp(lse - top), tl.exp(total - top)
    both = here + there
    share = tl.maximum(both, 1.0)
    out = tl.where((lse == float("-inf"))[:, None], 0.0, out) * (here / share)[:, None]
    found = tl.where((total == float("-inf"))[:, None], 0.0, found) * (there / share)[:, None]
    return out + found, top + tl.log(both)


@triton.jit
def merge_rows_kernel(
    out, lse, found, found_lse, basis, places, rows,
    out_stride, lse_stride, lse_head, found_stride, found_head, found_lse_stride, found_lse_head,
    GROUP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr, PART: tl.constexpr,
    PLACED: tl.constexpr,
):  # fmt: skip
    """One program: ROWS of the tokens * GROUP rows of a KV head. Row i of `found` [tokens, heads * GROUP, DIM], turned
    by basis [heads, DIM, DIM], goes to token places[i] of `out`, or, without places, to token i; *_head are strides."""
    head = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    token, query_head = (row // GROUP).to(tl.int64), head * GROUP + row % GROUP
    values = found + token * found_stride + query_head * found_head
    total = tl.load(found_lse + token * found_lse_stride + query_head * found_lse_head, mask=there, other=float("-inf"))
    if PLACED:
        token = tl.load(places + token, mask=there, other=0)
    known = lse + token * lse_stride + query_head * lse_head
    before = tl.load(known, mask=there, other=float("-inf"))
    mine = out + token * out_stride + query_head * DIM
    both = before
    for first in tl.range(0, DIM, COLUMNS, num_stages=1):
        to = first + tl.arange(0, COLUMNS)
        turned = turn_rows(values, there, basis + head * DIM * DIM, to, ROWS, DIM, COLUMNS, PART)
        at, inside = mine[:, None] + to[None, :], there[:, None] & (to < DIM)[None, :]
        new, both = merge(tl.load(at, mask=inside, other=0).to(tl.float32), before, turned, total)
        tl.store(at, new.to(out.dtype.element_ty), mask=inside)
    tl.store(known, both, mask=there)
