"""Checks and grids of attention over uncompressed pages."""

from __future__ import annotations

import torch
import triton.language as tl

from mosaic_kernels.attend_dense.kernel import LOG2_E, attend_dense_kernel, merge_pieces_kernel
from mosaic_kernels.merge_pieces import join_sizes
from mosaic_kernels.plan_step.step import DENSE_WARPS, DenseBatch
from mosaic_kernels.segment_table import MOST_GROUP, padded

_FACTORS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
WARPS, STAGES, MERGE_WARPS = DENSE_WARPS, 2, 4


def attend_dense(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    batch: DenseBatch,
    scale: float,
    page_size: int = 64,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one query for each request over its uncompressed pages.

    Args:
        q: [requests, Hq, k_dim] float, heads and channels contiguous.
        k: [rows, H, k_dim], v: [rows, H, v_dim]: bfloat16 or float16, heads and channels contiguous; the slabs.
        batch: which of their pages are read.
        scale: factor of the logits.
        dtype: of the output.

    Returns:
        out [requests, Hq, v_dim] and the natural log-sum-exp [requests, Hq], float32; of a request without such pages 0
        and -inf.

    Raises:
        ValueError: shapes or types.
    """
    requests, query_heads, k_dim = q.shape
    heads, v_dim = v.shape[1:]
    group = query_heads // heads
    if k.shape[1:] != (heads, k_dim) or query_heads % heads or not 1 <= group <= MOST_GROUP:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit together")
    if k.dtype != v.dtype or k.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"k and v must both be bfloat16 or float16, got {k.dtype} and {v.dtype}")
    if requests != len(batch.tokens):
        raise ValueError(f"q has {requests} requests, the plan {len(batch.tokens)}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.stride()[1:] != (x.shape[2], 1):
            raise ValueError(f"heads and channels of {name} must be contiguous, got strides {x.stride()}")
    capacity = len(batch.pieces)
    out = torch.empty(capacity, heads, group, v_dim, device=q.device)
    lse = torch.empty(capacity, heads, group, device=q.device)
    attend_dense_kernel[capacity, heads](
        q, k, v, batch.frames, batch.first_page, batch.tokens, batch.pieces, out, lse,
        q.stride(0), k.stride(0), v.stride(0), scale * LOG2_E.value,
        HEADS=heads, GROUP=group, ROWS=MOST_GROUP, T=page_size, DK=padded(k_dim), K_DIM=k_dim, DV=padded(v_dim),
        V_DIM=v_dim,
        # Triton's interpreter multiplies the bits of bfloat16.
        FACTOR=_FACTORS[k.dtype] if k.is_cuda else tl.float32, num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    result = torch.empty(requests, query_heads, v_dim, dtype=dtype, device=q.device)
    result_lse = torch.empty(requests, query_heads, device=q.device)
    sizes = join_sizes(capacity // DENSE_WARPS, requests, v_dim)
    merge_pieces_kernel[requests, query_heads, -(-v_dim // sizes["COLUMNS"])](
        out, lse, batch.first_piece, result, result_lse, query_heads, V_DIM=v_dim, **sizes, num_warps=MERGE_WARPS
    )
    return result, result_lse
