"""Reference encoder and decoder of per-vector important elements. Plain torch, any device."""

from __future__ import annotations

import torch

from mosaic_kernels.topk.segment import TopKFormat

HALF_STEP = 1 / (2 * 127)
"""Of int8, as a share of the token's largest value."""


def pack(k_rot: torch.Tensor, v_rot: torch.Tensor, fmt: TopKFormat, data: torch.Tensor) -> None:
    """k_rot [N, page_size, k_dim] and v_rot [N, page_size, v_dim] float32 into zeroed uint8 data [N, >= segment_bytes].

    Equal magnitudes: the lower channel is kept. A token that is not finite gets an infinite scale.
    """
    for x, (dim, keep, scales_at, bitmap_at, values_at) in zip((k_rot, v_rot), fmt.parts, strict=True):
        chosen = _largest(x, keep)
        values = x.gather(-1, chosen)
        # The next float16 up, so that the largest fits its byte; infinity and NaN stay what they are.
        scales = (values.abs().amax(-1) / 127).half()
        scales = torch.where(scales.isfinite(), (scales.view(torch.int16) + 1).view(torch.float16), scales)
        codes = (values / scales[..., None].float()).round().clamp(-127, 127).char()
        kept = torch.zeros(x.shape, dtype=torch.uint8, device=x.device).scatter_(-1, chosen, 1)
        weights = 1 << torch.arange(8, dtype=torch.uint8, device=x.device)
        bitmap = (kept.unflatten(-1, (dim // 8, 8)) * weights).sum(-1, dtype=torch.uint8)
        for at, part in ((scales_at, scales), (bitmap_at, bitmap), (values_at, codes)):
            part = part.contiguous().view(torch.uint8).flatten(1)
            data[:, at : at + part.shape[1]] = part


def decode(data: torch.Tensor, fmt: TopKFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 [N, >= segment_bytes] -> float32 k_rot [N, page_size, k_dim] and v_rot [N, page_size, v_dim]."""
    results = []
    for dim, keep, scales_at, bitmap_at, values_at in fmt.parts:
        tokens = fmt.page_size
        scales = data[:, scales_at:bitmap_at].contiguous().view(torch.float16).float()
        bitmap = data[:, bitmap_at:values_at].unflatten(-1, (tokens, dim // 8))
        codes = data[:, values_at : values_at + tokens * keep].view(torch.int8).unflatten(-1, (tokens, keep))
        kept = (bitmap[..., None] >> torch.arange(8, dtype=torch.uint8, device=data.device) & 1).flatten(-2).bool()
        # The n-th set bit of a token has the n-th value.
        which = (kept.long().cumsum(-1) - 1).clamp_min(0)
        values = codes.float().gather(-1, which) * scales[..., None]
        results.append(torch.where(kept, values, 0.0))
    return results[0], results[1]


def error_bounds(x: torch.Tensor, keep: int) -> torch.Tensor:
    """Largest error that `pack` makes of every value of x [N, T, D], float32: itself if it is dropped, half a step of
    int8 if it is kept."""
    magnitudes = x.abs()
    half_steps = magnitudes.amax(-1, keepdim=True) * HALF_STEP
    return magnitudes.scatter(-1, _largest(x, keep), half_steps.expand(*x.shape[:-1], keep))


def _largest(x: torch.Tensor, keep: int) -> torch.Tensor:
    """Channels of largest magnitude, [..., D] -> [..., keep] int64, rising."""
    channels = torch.arange(x.shape[-1], device=x.device)
    # Positive floats sort as their bits; the channel below them breaks ties the same way everywhere.
    keys = (x.abs().view(torch.int32).long() << 10) + (1023 - channels)
    return keys.topk(keep, dim=-1).indices.sort(-1).values
