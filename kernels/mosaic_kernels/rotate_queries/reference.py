"""Reference of rotated queries. Plain torch, any device; waits for it."""

from __future__ import annotations

import torch

from mosaic_kernels.page_batch import PageBatch


def rotate_queries(q: torch.Tensor, basis: torch.Tensor, batch: PageBatch) -> torch.Tensor:
    """As `launch.rotate_queries`; rows of items that are not there are 0."""
    heads, dim = basis.shape[1], basis.shape[3]
    out = torch.zeros(len(batch.epochs), heads, q.shape[1] // heads, dim, device=q.device)
    for item, (epoch, request) in enumerate(zip(batch.epochs.tolist(), batch.requests.tolist(), strict=True)):
        if epoch >= 0:
            out[item] = q[request].float().unflatten(0, (heads, -1)) @ basis[epoch]
    return out
