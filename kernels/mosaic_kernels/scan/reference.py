"""Reference of the scan. Plain torch, any device."""

from __future__ import annotations

import torch

from mosaic_kernels.page_batch import PageBatch
from mosaic_kernels.scan.keys import keys_of


def scan(
    q: torch.Tensor, scanned: torch.Tensor, known_lse: torch.Tensor, batch: PageBatch, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `launch.scan`, of decoded pages.

    Args:
        q: float32 [items, H, group, k_dim], rotated.
        scanned: [H, pages of the batch, page_size, C], K of base planes, 0 beyond a head's scan channels.
    """
    heads, pages, page_size, channels = scanned.shape
    keys = torch.zeros(heads, pages, page_size, dtype=torch.int16, device=q.device)
    lse = q.new_zeros(heads, pages, q.shape[2])
    first = batch.first_page.tolist()
    for item, request in enumerate(batch.requests.tolist()):
        mine = slice(first[item], first[item + 1])
        logits = (q[item, ..., :channels] * scale) @ scanned[:, mine].flatten(1, 2).transpose(1, 2)
        known = known_lse[request].view(heads, -1)
        keys[:, mine] = keys_of(logits, known, 1).view(heads, -1, page_size)
        lse[:, mine] = logits.unflatten(-1, (-1, page_size)).logsumexp(-1).transpose(1, 2)
    return keys, lse
