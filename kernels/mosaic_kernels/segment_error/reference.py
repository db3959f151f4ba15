"""Reference of the errors of encoded segments, and their headers. Plain torch, any device.

Header of a segment: byte 0, number of its format; bytes 4 to 7, float32, the relative error of the attention output to
be expected if all pages had this segment's error.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mosaic_kernels.constants import constant

FORMAT, ERROR = 0, 4
"""First bytes of the parts of a header."""


def relative_error(
    k_error: torch.Tensor, v_error: torch.Tensor, k_weight: float, v_weights: Sequence[float]
) -> torch.Tensor:
    """Errors of stored values [P, T, D] of one head -> float32 [P] of the attention output.

    Args:
        k_weight, v_weights: what a squared error counts: of K, and of each of the Dv channels of V.
    """
    v_squares = v_error.double().square() * constant(tuple(v_weights), torch.float64, v_error.device)
    squared = k_error.double().square().sum((1, 2)) * k_weight + v_squares.sum((1, 2))
    # Rounded, so that the order of summation does not show in the bytes; of NaN there is one that all devices write.
    return torch.where(squared.isnan(), torch.nan, squared.sqrt().bfloat16().float())


def put_header(data: torch.Tensor, number: int | torch.Tensor, error: torch.Tensor) -> None:
    """Write the headers of segments [P, bytes]."""
    data[:, FORMAT] = number
    data[:, ERROR : ERROR + 4] = error[:, None].contiguous().view(torch.uint8)
