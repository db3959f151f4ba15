"""Which format a segment gets: the one with the least expected error among those that fill its bytes.

The expected error of a code is a share of the squared range that it spans; ranges are known before anything is coded.
Squares are summed as integers, so that the choice is the same on every device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mosaic_kernels.constants import constant
from mosaic_kernels.segment import GROUP, V_BLOCK, SegmentFormat
from mosaic_kernels.segment_encode.outliers import ranges_without
from mosaic_kernels.segment_encode.quantise import K_COVER_2_BITS, V_COVER_2_BITS

_INTEGER_BITS = 15
# Least energy of a group of K, as a share of its segment's largest: directions that keys hardly used so far may matter
# later, when RoPE has turned keys and queries further (docs/codec.md).
_LEAST_K = 0.03


def _shares(dropped: float, cover_2_bits: float) -> dict[int, float]:
    """Bits -> mean squared error of a code as a share of its squared range."""
    shares = {bits: 1 / 12 / (2**bits - 1) ** 2 for bits in (2, 3, 4, 5, 6, 8)}
    # Narrower cells, and what is lost outside: together taken to gain half of what the cells gain.
    shares[2] *= (1 + cover_2_bits**2) / 2
    return {0: dropped, **shares}


# Dropped values leave a token's spread over 32 channels, dropped keys a channel's spread over the tokens. The latter
# count four times: later queries turn (basis.py), and where nothing is stored any direction of theirs is an error.
K_SHARES = _shares(4 / 12, K_COVER_2_BITS)
V_SHARES = _shares(1 / 14, V_COVER_2_BITS)


def energies(k_rot: torch.Tensor, v_rot: torch.Tensor, exceptions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of squared ranges, what K_SHARES and V_SHARES are shares of.

    Args:
        k_rot: [N, T, Dk] float32; v_rot: [N, T, Dv] float32.
        exceptions: outlying tokens that are left out of K's ranges.

    Returns:
        [N, Dk / 16] over the channels of each group, times T so that both count errors summed over values; and
        [N, Dv / 32, rounded up] over the tokens, times the channels of the block. float64.
    """
    low, high, _ = ranges_without(k_rot, exceptions)
    k = _sum_of_squares((high - low).unflatten(-1, (-1, GROUP))) * k_rot.shape[1]
    k = torch.maximum(k, k.amax(1, keepdim=True) * _LEAST_K)
    ranges = [block.amax(-1) - block.amin(-1) for block in v_rot.split(V_BLOCK, -1)]
    channels = tuple(block.shape[-1] for block in v_rot.split(V_BLOCK, -1))
    return k, _sum_of_squares(torch.stack(ranges, 1)) * constant(channels, torch.int64, v_rot.device)


def costs(
    k_rot: torch.Tensor,
    v_rot: torch.Tensor,
    formats: Sequence[SegmentFormat],
    k_weight: float,
    v_weight: float,
) -> torch.Tensor:
    """Expected weighted squared error of every segment in every format, [N, formats] float64."""
    result = torch.empty(len(k_rot), len(formats), dtype=torch.float64, device=k_rot.device)
    for exceptions in {fmt.exceptions for fmt in formats}:
        which = [i for i, fmt in enumerate(formats) if fmt.exceptions == exceptions]
        k, v = energies(k_rot, v_rot, exceptions)
        total = 0.0
        # Group by group: the order of summation is fixed.
        for g in range(k.shape[1]):
            shares = tuple(k_weight * K_SHARES[formats[i].k_bits[g]] for i in which)
            total = total + k[:, g, None] * constant(shares, torch.float64, k.device)
        for b in range(v.shape[1]):
            shares = tuple(v_weight * V_SHARES[formats[i].v_bits[2 * b]] for i in which)
            total = total + v[:, b, None] * constant(shares, torch.float64, v.device)
        for column, i in enumerate(which):
            result[:, i] = total[:, column]
    return result


def _sum_of_squares(x: torch.Tensor) -> torch.Tensor:
    """Over the last dimension, [N, M, C] -> [N, M] float64, exact up to 2^-15 of each row's largest value."""
    largest = x.amax((1, 2), keepdim=True).double().clamp_min(1e-300)
    integers = (x.double() / largest * 2**_INTEGER_BITS).round().nan_to_num(0, 0, 0).long()
    return integers.square().sum(-1).double() * (largest.squeeze(-1) / 2**_INTEGER_BITS).square()
