"""Device code: the query of an item in its basis."""

import triton
import triton.language as tl


@triton.jit
def rotate_queries_kernel(
    q, basis, epochs, requests, out, q_stride,
    HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: an item, a KV head and COLUMNS of the basis [E, HEADS, DIM, DIM]. out [items, HEADS, GROUP, DIM]."""
    item, head = tl.program_id(0), tl.program_id(1)
    epoch = tl.load(epochs + item)
    if epoch < 0:
        return
    r, c = tl.arange(0, ROWS), tl.arange(0, D)
    to = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    at = q + tl.load(requests + item).to(tl.int64) * q_stride + (head * GROUP + r)[:, None] * DIM + c[None, :]
    query = tl.load(at, mask=(r < GROUP)[:, None] & (c < DIM)[None, :], other=0).to(tl.float32)
    square = basis + (epoch * HEADS + head) * DIM * DIM + c[:, None] * DIM + to[None, :]
    turn = tl.load(square, mask=(c < DIM)[:, None] & (to < DIM)[None, :], other=0)
    found = tl.dot(query, turn, input_precision="tf32x3")
    row = (item * HEADS + head) * GROUP + r
    tl.store(out + row[:, None] * DIM + to[None, :], found, mask=(r < GROUP)[:, None] & (to < DIM)[None, :])
