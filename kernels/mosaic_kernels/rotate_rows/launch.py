"""Checks and grid of rotated rows."""

from __future__ import annotations

import torch

from mosaic_kernels.rotate_rows.kernel import rotate_rows_kernel
from mosaic_kernels.segment_table import padded

ROWS, COLUMNS, PART, WARPS = 64, 64, 32, 8


def rotate_rows(x: torch.Tensor, basis: torch.Tensor, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """Every head's rows times its basis.

    Args:
        x: [tokens, H * group, D] float, heads and channels contiguous.
        basis: float32 [H, D, D], contiguous.
        dtype: of the result; values beyond its range saturate.

    Returns:
        [tokens, H * group, D].

    Raises:
        ValueError: shapes or types.
    """
    heads, dim = basis.shape[:2]
    if basis.shape[2] != dim or basis.dtype != torch.float32 or not basis.is_contiguous():
        raise ValueError(f"basis must be contiguous float32 [H, D, D], got {basis.dtype} {tuple(basis.shape)}")
    if x.dim() != 3 or x.shape[1] % heads or x.shape[2] != dim or x.stride()[1:] != (dim, 1):
        raise ValueError(
            f"x must be [tokens, multiple of {heads}, {dim}], heads and channels contiguous, got {tuple(x.shape)} "
            f"with strides {x.stride()}"
        )
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    group = x.shape[1] // heads
    rows, columns = len(x) * group, min(COLUMNS, padded(dim))
    if rows:
        rotate_rows_kernel[-(-rows // ROWS), heads, -(-dim // columns)](
            x, basis, out, rows, x.stride(0), torch.finfo(dtype).max,
            GROUP=group, ROWS=ROWS, DIM=dim, COLUMNS=columns, PART=PART, num_warps=WARPS,
        )  # fmt: skip
    return out
