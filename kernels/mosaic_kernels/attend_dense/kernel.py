"""Device code: flash-decoding over the uncompressed pages of a piece, and the merge of a request's pieces."""

import triton
import triton.language as tl

from mosaic_kernels.load_piece import load_piece
from mosaic_kernels.merge_pieces import add_pieces, join_pieces, no_pieces

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def attend_dense_kernel(
    q, k, v, frames, first_page, tokens, pieces, out, lse, q_stride, k_stride, v_stride, factor,
    HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, T: tl.constexpr,
    DK: tl.constexpr, K_DIM: tl.constexpr, DV: tl.constexpr, V_DIM: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """One program: a piece and a KV head; FACTOR is the type of what is multiplied.

    q [requests, HEADS * GROUP, K_DIM]; out [pieces, HEADS, GROUP, V_DIM].
    """
    piece, head = tl.program_id(0), tl.program_id(1)
    request, first, last = load_piece(pieces, piece)
    if request < 0:
        return
    r, t = tl.arange(0, ROWS), tl.arange(0, T)
    c, d = tl.arange(0, DK), tl.arange(0, DV)
    at = q + request.to(tl.int64) * q_stride + (head * GROUP + r)[:, None] * K_DIM + c[None, :]
    query = tl.load(at, mask=(r < GROUP)[:, None] & (c < K_DIM)[None, :], other=0).to(FACTOR)
    # The request's last page may be partly filled.
    end = tl.load(first_page + request) * T + tl.load(tokens + request)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    summed = tl.zeros([ROWS, DV], tl.float32)
    k += head * K_DIM
    v += head * V_DIM
    for page in range(first, last):
        row = tl.load(frames + page).to(tl.int64) * T + t
        there = page * T + t < end
        keys = tl.load(k + row[None, :] * k_stride + c[:, None], mask=there[None, :] & (c < K_DIM)[:, None], other=0)
        logits = tl.where(there[None, :], tl.dot(query, keys.to(FACTOR)) * factor, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        weights = tl.exp2(logits - new_top[:, None])
        decay = tl.exp2(top - new_top)
        total = total * decay + tl.sum(weights, 1)
        values = tl.load(v + row[:, None] * v_stride + d[None, :], mask=there[:, None] & (d < V_DIM)[None, :], other=0)
        summed = tl.dot(weights.to(FACTOR), values.to(FACTOR), summed * decay[:, None])
        top = new_top
    to = (piece * HEADS + head) * GROUP + r
    tl.store(
        out + to[:, None] * V_DIM + d[None, :],
        summed / total[:, None],
        mask=(r < GROUP)[:, None] & (d < V_DIM)[None, :],
    )
    tl.store(lse + to, (top + tl.log2(total)) / LOG2_E, mask=r < GROUP)


@triton.jit
def merge_pieces_kernel(
    out, lse, first_piece, result, result_lse, heads,
    V_DIM: tl.constexpr, COLUMNS: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """One program: a request, a query head and COLUMNS of V. out [pieces, heads, V_DIM] -> result [requests, heads,
    V_DIM]."""
    request, head = tl.program_id(0), tl.program_id(1)
    d = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    top, total, summed = no_pieces(PIECES, COLUMNS)
    first, last = tl.load(first_piece + request), tl.load(first_piece + request + 1)
    top, total, summed = add_pieces(top, total, summed, out, lse, first, last, head, heads, d, V_DIM, PIECES)
    mean, found = join_pieces(top, total, summed)
    row = request * heads + head
    tl.store(result + row * V_DIM + d, mean.to(result.dtype.element_ty), mask=d < V_DIM)
    tl.store(result_lse + row, found)
