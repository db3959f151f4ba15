"""Bases as digits of one byte, for a kernel that multiplies bytes."""

from __future__ import annotations

from typing import NamedTuple

import torch

from mosaic_kernels.segment_encode.exact import BASIS_BITS, magnitude, to_integers
from mosaic_kernels.segment_table import MOST_CHANNELS, padded

LEAST_INPUTS = 32
"""Channels that a product of bytes sums at least."""
_LARGEST = 127 * (1 + (1 << 8) + (1 << 16))
"""The largest number of three digits. -2^23 has three, too, 2^23 has not."""


class RotationTable(NamedTuple):
    """Bases of the KV heads H of one layer; D channels."""

    digits: torch.Tensor
    """int8 [H, 3 or 4, D, D], output channels first, both D filled up to powers of two by zeros: a basis in units of
    2^-23 of its largest magnitude's power of two is the sum of digit i times 256^i."""
    exponents: torch.Tensor
    """int32 [H]: one unit is 2^exponent."""
    dim: int
    """D."""

    @property
    def heads(self) -> int:
        """KV heads."""
        return len(self.digits)


def make_rotation_table(basis: torch.Tensor) -> RotationTable:
    """The table of float32 bases [H, D, D], on their device, for which it waits once.

    Raises:
        ValueError: shape, dtype, or a value that is not finite.
    """
    if basis.dim() != 3 or basis.shape[1] != basis.shape[2] or basis.dtype != torch.float32:
        raise ValueError(f"basis must be float32 [heads, channels, channels], got {basis.dtype} {tuple(basis.shape)}")
    dim = basis.shape[1]
    if not 1 <= dim <= MOST_CHANNELS:
        raise ValueError(f"basis must have 1 to {MOST_CHANNELS} channels, got {dim}")
    largest = magnitude(basis)
    integers, unit = to_integers(basis, largest, BASIS_BITS)
    integers = integers.nan_to_num(0, 0, 0).int().transpose(1, 2)
    finite, fits = torch.stack((largest.isfinite().all(), (integers <= _LARGEST).all())).tolist()
    if not finite:
        raise ValueError("basis must be finite, found NaN or infinity")
    digits = torch.zeros(
        len(basis), 3 if fits else 4, padded(dim), max(padded(dim), LEAST_INPUTS), dtype=torch.int8, device=basis.device
    )
    rest = integers
    for digit in digits.unbind(1):
        # The lowest byte as a signed number; what is left is a multiple of 256.
        digit[:, :dim, :dim] = low = (rest + 128 & 0xFF) - 128
        rest = rest - low >> 8
    exponents = torch.frexp(unit.view(-1)).exponent.int() - 1
    return RotationTable(digits, exponents, dim)
