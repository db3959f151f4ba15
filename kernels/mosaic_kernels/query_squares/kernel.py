"""Device code of the query statistics."""

import triton
import triton.language as tl


@triton.jit
def add_squares_kernel(
    q, sums, rows, token_stride, head_stride, channel_stride,
    GROUP: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One program: CHANNELS channels of one KV head, all `rows` of its query heads. No two write the same sum, so that
    the order of summation, and with it the last bit, is always the same."""
    head = tl.program_id(0)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    total = tl.zeros([ROWS, CHANNELS], tl.float64)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        at = (row // GROUP).to(tl.int64) * token_stride + (head * GROUP + row % GROUP) * head_stride
        inside = (row < rows)[:, None] & (c < D)[None, :]
        x = tl.load(q + at[:, None] + c[None, :] * channel_stride, mask=inside, other=0)
        x = x.to(tl.float32).to(tl.float64)
        total += x * x
    at = head * D + c
    tl.store(sums + at, tl.load(sums + at, mask=c < D, other=0) + tl.sum(total, 0), mask=c < D)
