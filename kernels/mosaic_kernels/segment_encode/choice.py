"""Which format a segment gets: the one with the least expected error among those that fill its bytes.

The expected error of a code of K is a share of the squared range that it spans, of V a share of the values' squares;
both are known before anything is coded. Squares are summed as integers, so that the choice is the same on every device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from mosaic_kernels.constants import constant
from mosaic_kernels.segment import GROUP, SegmentFormat
from mosaic_kernels.segment_encode.outliers import ranges_without

_INTEGER_BITS = 15
K_SHARES = {0: 0.044, 1: 0.0225, 2: 0.0066} | {bits: 1 / 12 / (2**bits - 1) ** 2 for bits in (3, 4, 5, 6, 8)}
"""Bits -> mean squared error as a share of the squared range of a channel of K, for 64 normal values."""
V_SHARES = {0: 1.0, 1: 0.362, 2: 0.115, 3: 0.034, 4: 0.0094, 5: 0.0026, 6: 0.00062, 8: 0.000053}
"""Bits -> mean squared error as a share of the squares of V, for 64 normal values."""


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
    k = _sum_of_squares((high - low).unflatten(-1, (-1, GROUP))) * k_rot.shape[1]
    v = v_rot.abs() * constant(tuple(math.sqrt(weight) for weight in v_weights), torch.float32, v_rot.device)
    return k, _sum_of_squares(v.unflatten(-1, (-1, GROUP)).transpose(1, 2).flatten(2))


def costs(
    k_rot: torch.Tensor,
    v_rot: torch.Tensor,
    formats: Sequence[SegmentFormat],
    k_weight: float,
    v_weights: Sequence[float],
) -> torch.Tensor:
    """Expected weighted squared error of every segment in every format, [N, formats] float64.

    Args:
        k_weight, v_weights: what a squared error counts: of K, and of each of the Dv channels of V.
    """
    result = torch.empty(len(k_rot), len(formats), dtype=torch.float64, device=k_rot.device)
    for exceptions in {fmt.exceptions for fmt in formats}:
        which = [i for i, fmt in enumerate(formats) if fmt.exceptions == exceptions]
        k, v = energies(k_rot, v_rot, exceptions, v_weights)
        total = 0.0
        # Group by group: the order of summation is fixed.
        for g in range(k.shape[1]):
            shares = tuple(k_weight * K_SHARES[formats[i].k_bits[g]] for i in which)
            total = total + k[:, g, None] * constant(shares, torch.float64, k.device)
        for g in range(v.shape[1]):
            shares = tuple(V_SHARES[formats[i].v_bits[g]] for i in which)
            total = total + v[:, g, None] * constant(shares, torch.float64, v.device)
        for column, i in enumerate(which):
            result[:, i] = total[:, column]
    return result


def _sum_of_squares(x: torch.Tensor) -> torch.Tensor:
    """Over the last dimension, [N, M, C] -> [N, M] float64, exact up to 2^-15 of each row's largest value."""
    largest = x.amax((1, 2), keepdim=True).double().clamp_min(1e-300)
    integers = (x.double() / largest * 2**_INTEGER_BITS).round().nan_to_num(0, 0, 0).long()
    return integers.square().sum(-1).double() * (largest.squeeze(-1) / 2**_INTEGER_BITS).square()
