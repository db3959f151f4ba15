"""Checks and grid of the last step of attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mosaic_kernels.combine.kernel import combine_kernel, join_items_kernel
from mosaic_kernels.merge_pieces import join_sizes
from mosaic_kernels.page_batch import PageBatch
from mosaic_kernels.segment_table import MOST_GROUP, padded

WARPS, COLUMNS = 4, 32
JOIN_WARPS = 4


def combine(
    parts: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    batch: PageBatch,
    unrotate: torch.Tensor,
    dense_out: torch.Tensor,
    dense_lse: torch.Tensor,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Attention over dense pages and everything that the pieces read.

    Args:
        parts: one or two of (out float32 [pieces, H, group, v_dim], rotated; lse [pieces, H, group]; first_piece int32
            [items + 1], where an item's pieces begin).
        batch: what they read.
        unrotate: float32 [E, H, v_dim, v_dim], contiguous: rotated output times this is the output.
        dense_out: [requests, H * group, v_dim] any float, contiguous; dense_lse: [requests, H * group], natural, -inf
            where a request has no dense tokens.
        dtype: of the result; None: that of `dense_out`.

    Returns:
        [requests, H * group, v_dim]; requests without any token: 0.

    Raises:
        ValueError: shapes or types.
    """
    if not 1 <= len(parts) <= 2:
        raise ValueError(f"parts must be one or two results, got {len(parts)}")
    _, heads, group, v_dim = parts[0][0].shape
    requests = len(batch.first_item) - 1
    wanted = requests, heads * group, v_dim
    if dense_out.shape != wanted or dense_lse.shape != wanted[:2]:
        found = tuple(dense_out.shape), tuple(dense_lse.shape)
        raise ValueError(f"dense_out must be {wanted} and dense_lse {wanted[:2]}, got {found[0]} and {found[1]}")
    if unrotate.shape[1:] != (heads, v_dim, v_dim) or unrotate.dtype != torch.float32:
        raise ValueError(f"unrotate must be float32 [E, {heads}, {v_dim}, {v_dim}], got {tuple(unrotate.shape)}")
    tensors = [x for part in parts for x in part]
    if any(not x.is_contiguous() for x in (*tensors, unrotate, dense_out, dense_lse)):
        raise ValueError("all tensors must be contiguous")
    result = torch.empty_like(dense_out, dtype=dtype)
    items, columns = len(batch.epochs), min(COLUMNS, padded(v_dim))
    joined = torch.empty(items, heads, group, v_dim, device=dense_out.device)
    joined_lse = torch.empty(items, heads, group, device=dense_out.device)
    if items:
        sizes = join_sizes(batch.capacity, requests, v_dim)
        join_items_kernel[items, heads * group, -(-v_dim // sizes["COLUMNS"])](
            *parts[0], *parts[-1], batch.epochs, joined, joined_lse, heads * group,
            V_DIM=v_dim, **sizes, TWO=len(parts) == 2, num_warps=JOIN_WARPS,
        )  # fmt: skip
    if requests:
        combine_kernel[requests, heads, -(-v_dim // columns)](
            joined, joined_lse, dense_out, dense_lse, unrotate, batch.first_item, batch.epochs, result,
            HEADS=heads, GROUP=group, ROWS=MOST_GROUP, DV=padded(v_dim), V_DIM=v_dim, COLUMNS=columns, num_warps=WARPS,
        )  # fmt: skip
    return result
