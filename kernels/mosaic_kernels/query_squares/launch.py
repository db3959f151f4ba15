"""Checks and grid of the query statistics."""

from __future__ import annotations

import torch

from mosaic_kernels.query_squares.kernel import add_squares_kernel

ROWS, CHANNELS, WARPS = 128, 16, 4
"""ROWS: queries of one head that a program reads at a time."""


def add_squares(q: torch.Tensor, sums: torch.Tensor) -> None:
    """Add the squares of the channels of queries, summed over tokens and over the query heads of a KV head.

    One launch; nothing is allocated, so that a CUDA graph can replay it. The same queries in the same order give the
    same bits.

    Args:
        q: [T, Hq, Dk] of any float dtype, Hq a multiple of Hkv; query head h shares KV head h // (Hq / Hkv).
        sums: float64 [Hkv, Dk], contiguous, written.

    Raises:
        ValueError: shapes or types.
    """
    if sums.dim() != 2 or sums.dtype != torch.float64 or not sums.is_contiguous():
        raise ValueError(f"sums must be contiguous float64 [KV heads, channels], got {sums.dtype} {tuple(sums.shape)}")
    heads, dim = sums.shape
    if q.dim() != 3 or q.shape[1] % heads or q.shape[2] != dim or not q.is_floating_point():
        raise ValueError(
            f"q must be of a float dtype and [tokens, multiple of {heads}, {dim}], got {q.dtype} {tuple(q.shape)}"
        )
    group = q.shape[1] // heads
    if q.numel():
        add_squares_kernel[heads, -(-dim // CHANNELS)](
            q, sums, len(q) * group, *q.stride(),
            GROUP=group, D=dim, ROWS=ROWS, CHANNELS=CHANNELS, num_warps=WARPS,
        )  # fmt: skip
