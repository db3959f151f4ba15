"""Tokens of a segment whose keys stand out: attention sinks and massive activations."""

from __future__ import annotations

import torch


def ranges_without(k_rot: torch.Tensor, exceptions: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Range of each channel once the outlying tokens are gone.

    A token stands out by its largest distance, over all channels, from the middle of a channel's range. Comparisons
    alone, no sums: the choice is the same on every device.

    Args:
        k_rot: [N, T, D] float32.
        exceptions: tokens to leave out, fewer than T.

    Returns:
        low, high [N, D] float32; tokens [N, exceptions] int64, those left out, in rising order.
    """
    low, high = k_rot.amin(1), k_rot.amax(1)
    if not exceptions:
        return low, high, torch.empty(len(k_rot), 0, dtype=torch.int64, device=k_rot.device)
    middle = low * 0.5 + high * 0.5
    distance = (k_rot - middle[:, None]).abs().amax(-1)
    # Positive floats sort as their bits; the token's number below them breaks ties the same way everywhere.
    tokens = torch.arange(k_rot.shape[1], device=k_rot.device)
    keys = (distance.view(torch.int32).long() << 8) + (255 - tokens)
    tokens = keys.topk(exceptions, dim=1).indices.sort(dim=1).values
    out = torch.zeros(k_rot.shape[:2], dtype=torch.bool, device=k_rot.device).scatter_(1, tokens, True)[..., None]
    return k_rot.masked_fill(out, torch.inf).amin(1), k_rot.masked_fill(out, -torch.inf).amax(1), tokens
