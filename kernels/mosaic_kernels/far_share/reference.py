"""Reference of the far field's share. Plain torch, any device; waits for it."""

from __future__ import annotations

import itertools

import torch


def selected_lse(lse: torch.Tensor, first_piece: torch.Tensor, out: torch.Tensor) -> None:
    """As `launch.selected_lse`."""
    for item, (first, last) in enumerate(_spans(first_piece)):
        out[item] = torch.logsumexp(lse[first:last], 0) if first < last else -torch.inf


def keep_share(
    lse: torch.Tensor,
    first_piece: torch.Tensor,
    kept: torch.Tensor,
    far_lse: torch.Tensor,
    far_first_piece: torch.Tensor,
) -> None:
    """As `launch.keep_share`."""
    now = torch.empty_like(kept)
    selected_lse(lse, first_piece, now)
    drift = torch.where(now.isfinite() & kept.isfinite(), now - kept, 0.0)
    for of_item, (first, last) in zip(drift, _spans(far_first_piece), strict=True):
        far_lse[first:last] += of_item


def _spans(first: torch.Tensor) -> list[tuple[int, int]]:
    return list(itertools.pairwise(first.tolist()))
