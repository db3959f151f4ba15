"""Checks and grid of the rotation."""

from __future__ import annotations

import torch

from mosaic_kernels.rotate_pages.kernel import rotate_kernel
from mosaic_kernels.rotate_pages.table import LEAST_INPUTS, RotationTable
from mosaic_kernels.segment import GROUP
from mosaic_kernels.segment_table import padded

ROWS, OUTPUTS, WARPS, STAGES = 64, 32, 4, 1
"""Tokens of a program, at least a page, and channels of the result that it computes at a time."""
_MANY = 64 * 128
"""Values of a tile beyond which WARPS would not have the registers."""


def rotate(x: torch.Tensor, table: RotationTable) -> torch.Tensor:
    """Pages in their basis, the same as `segment_encode.reference.rotate_pages`. One launch; nothing waits.

    A page that is not finite comes out as of the reference as far as its sums do not depend on their order.

    Args:
        x: [P, T, H, D] of any float dtype and strides, T a power of two of at least 16.
        table: the layer's bases.

    Returns:
        float32 [H, P, T, D], contiguous.

    Raises:
        ValueError: shape, dtype or device.
    """
    if x.dim() != 4 or x.shape[2:] != (table.heads, table.dim) or not x.is_floating_point():
        raise ValueError(
            f"x must be of a float dtype and [pages, tokens, {table.heads}, {table.dim}], got {x.dtype} "
            f"{tuple(x.shape)}"
        )
    pages, tokens, heads, dim = x.shape
    if tokens & (tokens - 1) or tokens < GROUP:
        raise ValueError(f"x must have a power of two of at least {GROUP} tokens a page, got {tokens}")
    if x.device != table.digits.device:
        raise ValueError(f"x must be on the table's device, {table.digits.device}, got {x.device}")
    out = torch.empty(heads, pages, tokens, dim, device=x.device)
    width = padded(dim)
    together = max(ROWS // tokens, 1)
    if pages:
        rotate_kernel[-(-pages // together), heads](
            x, table.digits, table.exponents, out, pages, *x.stride(),
            DIGITS=table.digits.shape[1], T=tokens, PAGES=together,
            D=width, DIM=dim, INPUTS=max(width, LEAST_INPUTS), OUTPUTS=min(width, OUTPUTS),
            num_warps=WARPS if together * tokens * width <= _MANY else 2 * WARPS, num_stages=STAGES,
            enable_fp_fusion=False,
        )  # fmt: skip
    return out
