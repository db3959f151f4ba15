"""Device code: log-sum-exp merge of what pieces found, for one query head."""

import triton
import triton.language as tl

from mosaic_kernels.segment_table import padded

FEWEST, MOST, TOGETHER = 32, 128, 4096
"""Pieces that a program looks at side by side; values of them."""


def join_sizes(capacity: int, requests: int, v_dim: int) -> dict[str, int]:
    """PIECES side by side and COLUMNS of a program: a request alone is cut into hundreds of pieces, which few programs
    would read one after the other; of many requests each has few.

    Args:
        capacity: pieces of all requests.
    """
    usual = -(-capacity // max(requests, 1))
    pieces = min(max(1 << (usual - 1).bit_length(), FEWEST), MOST)
    return {"PIECES": pieces, "COLUMNS": min(TOGETHER // pieces, padded(v_dim))}


@triton.jit
def no_pieces(PIECES: tl.constexpr, COLUMNS: tl.constexpr):
    """Of PIECES sums side by side, each with its own maximum, so that no thread waits for another: maxima, sums of
    weights and sums of COLUMNS channels of values."""
    return (
        tl.full([PIECES], float("-inf"), tl.float32),
        tl.zeros([PIECES], tl.float32),
        tl.zeros([PIECES, COLUMNS], tl.float32),
    )


@triton.jit
def add_pieces(top, total, summed, out, lse, first, last, head, heads, d, V_DIM: tl.constexpr, PIECES: tl.constexpr):
    """Adds the pieces from `first` on, channels d [COLUMNS] of them; out float32 [pieces, heads, V_DIM], lse [pieces,
    heads]."""
    for at in range(first, last, PIECES):
        piece = at + tl.arange(0, PIECES)
        there = piece < last
        row = piece * heads + head
        logit = tl.load(lse + row, mask=there, other=float("-inf"))
        found = tl.load(out + row[:, None] * V_DIM + d[None, :], mask=there[:, None] & (d < V_DIM)[None, :], other=0)
        new_top = tl.maximum(top, logit)
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        decay, weight = tl.exp(top - shift), tl.exp(logit - shift)
        found = tl.where((logit == float("-inf"))[:, None], 0.0, found)
        total = total * decay + weight
        summed = summed * decay[:, None] + found * weight[:, None]
        top = new_top
    return top, total, summed


@triton.jit
def join_pieces(top, total, summed):
    """Output [COLUMNS] and natural log-sum-exp of all; of nothing 0 and -inf."""
    highest = tl.max(top, 0)
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    share = tl.exp(top - shift)
    total = tl.sum(total * share, 0)
    return tl.sum(summed * share[:, None], 0) / tl.where(total == 0, 1.0, total), shift + tl.log(total)
