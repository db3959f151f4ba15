"""Reference of the last step of attention. Plain torch, any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mosaic_kernels.merge_lse.reference import merge
from mosaic_kernels.page_batch import PageBatch


def combine(
    parts: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    batch: PageBatch,
    unrotate: torch.Tensor,
    dense_out: torch.Tensor,
    dense_lse: torch.Tensor,
) -> torch.Tensor:
    """As `launch.combine`."""
    out, lse = dense_out.float(), dense_lse.float()
    _, heads, group = parts[0][1].shape
    results, totals = out.clone().view(len(out), heads, group, -1), lse.clone().view(len(lse), heads, group)
    epochs, requests = batch.epochs.tolist(), batch.requests.tolist()
    for item, (epoch, request) in enumerate(zip(epochs, requests, strict=True)):
        mine = torch.zeros_like(results[0]), torch.full_like(totals[0], -torch.inf)
        for found, total, first_piece in parts:
            for piece in range(*first_piece[item : item + 2].tolist()):
                mine = merge(*mine, found[piece], total[piece])
        turned = mine[0] @ unrotate[epoch].float()
        results[request], totals[request] = merge(results[request], totals[request], turned, mine[1])
    return results.view(len(out), heads * group, -1).to(dense_out.dtype)
