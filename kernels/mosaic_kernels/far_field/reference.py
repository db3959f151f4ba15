"""Reference of the far field. Plain torch, any device."""

from __future__ import annotations

import torch

from mosaic_kernels.page_batch import PageBatch


def far_field(far: torch.Tensor, means: torch.Tensor, batch: PageBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """As `launch.far_field`.

    Args:
        far: float32 [H, pages, group], logits; -inf: nothing.
        means: float32 [H, pages, v_dim], mean rotated values.
    """
    heads, _, group = far.shape
    out = far.new_zeros(batch.capacity, heads, group, means.shape[-1])
    lse = far.new_full((batch.capacity, heads, group), -torch.inf)
    for i, (item, first, last) in enumerate(batch.pieces.tolist()):
        if item >= 0:
            logits = far[:, first:last].transpose(1, 2)
            lse[i] = logits.logsumexp(-1)
            weights = torch.exp(logits - torch.where(lse[i] == -torch.inf, 0.0, lse[i])[..., None])
            out[i] = weights @ means[:, first:last]
    return out, lse
