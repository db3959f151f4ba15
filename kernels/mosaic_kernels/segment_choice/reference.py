"""Which format a segment gets: the one with the least expected error among those that fill its bytes.

The expected error of a code of K is a share of the squared range that it spans, of V a share of the values' squares;
that of top-k follows from what it drops. All are known before anything is coded. Squares are summed as integers, so
that the choice is the same on every device. Plain torch, any device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from mosaic_kernels.constants import constant
from mosaic_kernels.segment import GROUP, SegmentFormat
from mosaic_kernels.segment_encode.exact import sum_of_squares
from mosaic_kernels.segment_encode.outliers import ranges_without
from mosaic_kernels.topk.reference import error_bounds
from mosaic_kernels.topk.segment import TopKFormat

K_SHARES = {0: 0.044, 1: 0.0225, 2: 0.0066} | {bits: 1 / 12 / (2**bits - 1) ** 2 for bits in (3, 4, 5, 6, 8)}
"""Bits -> mean squared error as a share of the squared range of a channel of K, for 64 normal values."""
V_SHARES = {0: 1.0, 1: 0.362, 2: 0.115, 3: 0.034, 4: 0.0094, 5: 0.0026, 6: 0.00062, 8: 0.000053}
"""Bits -> mean squared error as a share of the squares of V, for 64 normal values."""


class HeadChoice(NamedTuple):
    """What the segments of one KV head choose from."""

    formats: tuple[SegmentFormat | TopKFormat, ...]
    k_weight: float
    """What a squared error of K counts."""
    v_weights: tuple[float, ...]
    """What one of each of the Dv channels of V counts."""


def choose(k_rot: torch.Tensor, v_rot: torch.Tensor, heads: Sequence[HeadChoice]) -> torch.Tensor:
    """The format of every segment: int32 [H, P], the first of those with the least cost, or whose cost is NaN.

    Args:
        k_rot: float32 [H, P, T, Dk]; v_rot: float32 [H, P, T, Dv].
    """
    return torch.stack([costs(*pages, *head).argmin(1).int() for *pages, head in zip(k_rot, v_rot, heads, strict=True)])


def energies(
    k_rot: torch.Tensor, v_rot: torch.Tensor, exceptions: int, v_weights: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """What K_SHARES and V_SHARES are shares of, by groups of 16 channels.

    Args:
        k_rot: [N, T, Dk] float32; v_rot: [N, T, Dv] float32.
        exceptions: outlying tokens that are left out of K's ranges.
        v_weights: of the Dv channels, what a squared error counts.

    Returns:
        [N, Dk / 16] squared ranges, times T so that both count errors summed over values; [N, Dv / 16] squares of V
        times weights. float64.
    """
    low, high, _ = ranges_without(k_rot, exceptions)
    k = sum_of_squares((high - low).unflatten(-1, (-1, GROUP))) * k_rot.shape[1]
    v = v_rot.abs() * _roots(v_weights, v_rot.device)
    return k, sum_of_squares(v.unflatten(-1, (-1, GROUP)).transpose(1, 2).flatten(2))


def costs(
    k_rot: torch.Tensor,
    v_rot: torch.Tensor,
    formats: Sequence[SegmentFormat | TopKFormat],
    k_weight: float,
    v_weights: Sequence[float],
) -> torch.Tensor:
    """Expected weighted squared error of every segment [N, T, D] in every format, [N, formats] float64.

    Args:
        k_weight, v_weights: what a squared error counts: of K, and of each of the Dv channels of V.
    """
    result = torch.empty(len(k_rot), len(formats), dtype=torch.float64, device=k_rot.device)
    for exceptions in {fmt.exceptions for fmt in formats if isinstance(fmt, SegmentFormat)}:
        which = [i for i, fmt in enumerate(formats) if getattr(fmt, "exceptions", None) == exceptions]
        k, v = energies(k_rot, v_rot, exceptions, v_weights)
        shares = constant(
            tuple(share for i in which for share in cost_shares(formats[i], k_weight)), torch.float64, k.device
        ).view(len(which), -1)
        total = 0.0
        # Group by group: the order of summation is fixed.
        for g, energy in enumerate(torch.cat((k, v), 1).unbind(1)):
            total = total + energy[:, None] * shares[:, g]
        result[:, which] = total
    for i, fmt in enumerate(formats):
        if isinstance(fmt, TopKFormat):
            k = sum_of_squares(error_bounds(k_rot, fmt.k_keep).flatten(1)[:, None])
            v = error_bounds(v_rot, fmt.v_keep) * _roots(v_weights, v_rot.device)
            result[:, i] = (k * k_weight + sum_of_squares(v.flatten(1)[:, None])).squeeze(1)
    return result


def cost_shares(fmt: SegmentFormat, k_weight: float) -> list[float]:
    """What `energies` are multiplied by, of K's groups, then of V's."""
    return [k_weight * K_SHARES[bits] for bits in fmt.k_bits] + [V_SHARES[bits] for bits in fmt.v_bits]


def _roots(weights: Sequence[float], device: torch.device) -> torch.Tensor:
    return constant(tuple(map(math.sqrt, weights)), torch.float32, device)
