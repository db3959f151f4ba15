"""Rotations, means and sums of squares that do not depend on the order of summation.

Floating-point sums round differently in every BLAS, batch shape and device, and one last bit is enough to flip a code.
Page bytes must not depend on any of that (they are content-addressed and compared between CPU and GPU), so the products
are sums of integers that float64 holds exactly.
"""

from __future__ import annotations

import torch

# 20 bits of input + 23 bits of basis + log2(channels) <= 53, the integers that float64 holds, up to 1024 channels.
INPUT_BITS = 20
BASIS_BITS = 23
SQUARE_BITS = 15  # of what is squared and summed: leaves room for 2^33 of them in an int64
MAX_CHANNELS = 1024
SMALLEST_EXPONENT = -100  # keeps the scaling factor 2^(bits - exponent) within float32


def magnitude(x: torch.Tensor) -> torch.Tensor:
    """Largest magnitude in each matrix: [..., M, N] -> [..., 1, 1]. NaN if there is one."""
    return torch.maximum(x.amax((-2, -1), keepdim=True), -x.amin((-2, -1), keepdim=True))


def rotate(x: torch.Tensor, largest: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """`x @ basis` per head, identical to the last bit for every batch shape and on every device.

    Args:
        x: [H, P, T, D] float32, finite.
        largest: `magnitude(x)`, [H, P, 1, 1].
        basis: [H, D, D] float32, finite.

    Returns:
        [H, P, T, D] float32. Inputs are first rounded to multiples of 2^-20 of their page's and head's largest
        magnitude (2^-23 for a head's basis), far below the finest quantisation step that follows.
    """
    left, left_unit = to_integers(x, largest, INPUT_BITS)
    right, right_unit = to_integers(basis, magnitude(basis), BASIS_BITS)
    # One large product per head: exactness makes the shape a matter of speed alone.
    product = torch.bmm(left.flatten(1, 2), right).view_as(x)
    return product.mul_(left_unit * right_unit[:, None]).float()


def exact_mean(x: torch.Tensor, without: torch.Tensor | None = None) -> torch.Tensor:
    """Mean over the tokens, [N, T, D] -> [N, D] float32, whatever the order of summation. NaN or infinity stay.

    Args:
        without: int64 [N, E], tokens that do not count, E < T; None: all do.
    """
    left_out = 0 if without is None else without.shape[1]
    if left_out:
        x = x.scatter(1, without[..., None].expand(-1, -1, x.shape[2]), 0)
    integers, unit = to_integers(x, magnitude(x), INPUT_BITS)
    return (integers.sum(1, keepdim=True) * unit / (x.shape[1] - left_out)).float().squeeze(1)


def sum_of_squares(x: torch.Tensor) -> torch.Tensor:
    """Over the last dimension, of float32 [N, M, C] from 0 on: [N, M] float64, exact up to 2^-15 of each matrix's
    largest value. NaN if one is not finite."""
    largest = x.amax((1, 2), keepdim=True).double().clamp_min(1e-300)
    integers = (x.double() / largest * 2**SQUARE_BITS).round().nan_to_num(0, 0, 0).long()
    return integers.square().sum(-1).double() * (largest.squeeze(-1) / 2**SQUARE_BITS).square()


def to_integers(x: torch.Tensor, largest: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Matrices and their `magnitude` -> float64 integers of at most 2^bits in magnitude, and the power of two that one
    of them is worth, float64."""
    # largest < 2^exponent. Scaling and rounding are exact in float32: bits < 24.
    exponent = torch.frexp(largest).exponent.clamp_min(SMALLEST_EXPONENT)
    # frexp() leaves the exponent of NaN and infinity open; any will do, they stay what they are.
    exponent = torch.where(largest.isfinite(), exponent, 0)
    # Powers of two from their bit patterns: pow() and ldexp() are not exact on every device.
    factor = (bits - exponent + 127 << 23).view(torch.float32)
    unit = (exponent.long() - bits + 1023 << 52).view(torch.float64)
    return x.mul(factor).round_().double(), unit
