"""Device code: rows of every head times the head's basis."""

import triton
import triton.language as tl


@triton.jit
def turn_rows(x, there, basis, to, ROWS: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr, PART: tl.constexpr):
    """Columns `to` of rows times basis [DIM, DIM], float32 [ROWS, COLUMNS]; x points at the rows that are `there`. PART
    channels at a time, so that few are in registers."""
    found = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in tl.range(0, DIM, PART, num_stages=1):
        c = first + tl.arange(0, PART)
        value = tl.load(x[:, None] + c[None, :], mask=there[:, None] & (c < DIM)[None, :], other=0).to(tl.float32)
        square = (c < DIM)[:, None] & (to < DIM)[None, :]
        turn = tl.load(basis + c[:, None] * DIM + to[None, :], mask=square, other=0)
        found = tl.dot(value, turn, found, input_precision="tf32x3")
    return found


@triton.jit
def rotate_rows_kernel(
    x, basis, out, rows, x_stride, MOST,
    GROUP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """One program: ROWS of the tokens * GROUP rows of a KV head, and COLUMNS of its basis [heads, DIM, DIM]. x and out
    [tokens, heads * GROUP, DIM]; results beyond MOST saturate, what is not a number stays."""
    head, heads = tl.program_id(1), tl.num_programs(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    to = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    token, query_head = (row // GROUP).to(tl.int64), head * GROUP + row % GROUP
    values = x + token * x_stride + query_head * DIM
    found = turn_rows(values, there, basis + head * DIM * DIM, to, ROWS, DIM, COLUMNS, PART)
    found = tl.where(found > MOST, MOST, tl.where(found < -MOST, -MOST, found))
    at = out + (token * heads * GROUP + query_head)[:, None] * DIM + to[None, :]
    tl.store(at, found.to(out.dtype.element_ty), mask=there[:, None] & (to < DIM)[None, :])
