"""Checks and grid of rotated queries."""

from __future__ import annotations

import torch

from mosaic_kernels.page_batch import PageBatch
from mosaic_kernels.rotate_queries.kernel import rotate_queries_kernel
from mosaic_kernels.segment_table import MOST_GROUP, padded

COLUMNS, WARPS = 32, 4


def rotate_queries(q: torch.Tensor, basis: torch.Tensor, batch: PageBatch) -> torch.Tensor:
    """The query of every item's request in the basis of the item's epoch.

    Args:
        q: [requests, H * group, k_dim] float, heads and channels contiguous.
        basis: float32 [E, H, k_dim, k_dim], contiguous: queries times this meet the stored keys.
        batch: the items; those with epoch -1 are not there.

    Returns:
        float32 [items, H, group, k_dim]; what belongs to no item is arbitrary.

    Raises:
        ValueError: shapes or types.
    """
    heads, dim = basis.shape[1:3]
    if basis.shape[3] != dim or basis.dtype != torch.float32 or not basis.is_contiguous():
        raise ValueError(f"basis must be contiguous float32 [E, H, D, D], got {basis.dtype} {tuple(basis.shape)}")
    if q.dim() != 3 or q.shape[1] % heads or q.shape[2] != dim or q.stride()[1:] != (dim, 1):
        raise ValueError(
            f"q must be [requests, multiple of {heads}, {dim}], heads and channels contiguous, got {tuple(q.shape)} "
            f"with strides {q.stride()}"
        )
    items, group = len(batch.epochs), q.shape[1] // heads
    out = torch.empty(items, heads, group, dim, device=q.device)
    if items:
        columns = min(COLUMNS, padded(dim))
        rotate_queries_kernel[items, heads, -(-dim // columns)](
            q, basis, batch.epochs, batch.requests, out, q.stride(0),
            HEADS=heads, GROUP=group, ROWS=MOST_GROUP, D=padded(dim), DIM=dim, COLUMNS=columns, num_warps=WARPS,
        )  # fmt: skip
    return out
