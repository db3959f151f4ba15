"""Arithmetic whose result does not depend on the order of summation.

Floating-point sums round differently in every BLAS, batch shape and device, and one last bit is enough to flip a code.
Page bytes must not depend on any of that (they are content-addressed and compared between CPU and GPU), so sums run
over integers that float64 holds exactly.
"""

from __future__ import annotations

import torch

# 20 bits of input + 23 bits of basis + log2(channels) <= 53, the integers that float64 holds, up to 1024 channels.
INPUT_BITS = 20
BASIS_BITS = 23
MAX_CHANNELS = 1024


def rotate(x: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """`x @ basis` per head, identical to the last bit for every batch shape and on every device.

    Args:
        x: [P, T, H, D] float32, finite.
        basis: [H, D, D] float32, finite.

    Returns:
        [P, H, T, D] float64. Inputs are first rounded to multiples of 2^-20 of their page's and head's largest
        magnitude (2^-23 for a head's basis): below a hundredth of the finest quantisation step that follows.
    """
    left, left_unit = _to_integers(x.permute(0, 2, 1, 3), INPUT_BITS)
    right, right_unit = _to_integers(basis, BASIS_BITS)
    return torch.matmul(left, right).mul_(left_unit).mul_(right_unit)


def _to_integers(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers of at most 2^bits in magnitude, per matrix of the last two dimensions.

    Args:
        x: [..., M, N] float.

    Returns:
        float64 integers [..., M, N] and the power of two that one of them is worth, float64 [..., 1, 1].
    """
    x = x.double()
    # x < 2^exponent; all-zero matrices have exponent 0.
    exponent = torch.frexp(x.abs().amax((-2, -1), keepdim=True)).exponent
    return x.mul(_power_of_two(bits - exponent)).round_(), _power_of_two(exponent - bits)


def _power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    # From the bit pattern: pow() and ldexp() are not exact on every device.
    return (exponent.long() + 1023 << 52).view(torch.float64)
