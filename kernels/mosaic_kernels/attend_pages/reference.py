"""Reference of attention over whole pages. Plain torch, any device."""

from __future__ import annotations

import torch

from mosaic_kernels.attend.reference import attend
from mosaic_kernels.page_batch import PageBatch


def attend_pages(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: PageBatch, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `launch.attend_pages`, of decoded pages.

    Args:
        q: float32 [items, H, group, k_dim], rotated.
        keys: [H, pages of the batch, page_size, k_dim]; values: [H, pages, page_size, v_dim]; rotated.
    """
    out = q.new_zeros(batch.capacity, *q.shape[1:3], values.shape[-1])
    lse = q.new_full((batch.capacity, *q.shape[1:3]), -torch.inf)
    for i, (item, first, last) in enumerate(batch.pieces.tolist()):
        if item >= 0:
            k, v = (x[:, first:last].flatten(1, 2) for x in (keys, values))
            found, total = attend(q[item].flatten(0, 1)[None], k, v, scale)
            out[i], lse[i] = found.view(out[i].shape), total.view(lse[i].shape)
    return out, lse
