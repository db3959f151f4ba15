"""Reference of attention over uncompressed pages. Plain torch, any device."""

from __future__ import annotations

import torch

from mosaic_kernels.attend.reference import attend
from mosaic_kernels.plan_step.step import DenseBatch


def attend_dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: DenseBatch, scale: float, page_size: int = 64
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `launch.attend_dense`."""
    out = torch.zeros(*q.shape[:2], v.shape[-1], device=q.device)
    lse = torch.full(q.shape[:2], -torch.inf, device=q.device)
    first_page = batch.first_page.tolist()
    for r, tokens in enumerate(batch.tokens.tolist()):
        frames = batch.frames[first_page[r] : first_page[r + 1]].long()
        rows = (frames[:, None] * page_size + torch.arange(page_size, device=q.device)).flatten()[:tokens]
        found, total = attend(q[r][None], k[rows].transpose(0, 1), v[rows].transpose(0, 1), scale)
        out[r], lse[r] = found[0], total[0]
    return out, lse
