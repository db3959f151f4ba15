"""Reference of rotated rows. Plain torch, any device."""

from __future__ import annotations

import torch


def rotate_rows(x: torch.Tensor, basis: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As `launch.rotate_rows`."""
    heads, most = len(basis), torch.finfo(dtype).max
    rows = x.float().unflatten(1, (heads, -1))
    return torch.einsum("thgd,hde->thge", rows, basis).flatten(1, 2).clamp(-most, most).to(dtype)
