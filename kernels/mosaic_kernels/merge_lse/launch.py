"""Checks and grid of merging attention over compressed pages into attention over others."""

from __future__ import annotations

import torch

from mosaic_kernels.merge_lse.kernel import merge_rows_kernel
from mosaic_kernels.segment_table import padded

ROWS, COLUMNS, PART, WARPS = 32, 32, 32, 4


def merge_rows(
    out: torch.Tensor,
    lse: torch.Tensor,
    found: torch.Tensor,
    found_lse: torch.Tensor,
    basis: torch.Tensor,
    places: torch.Tensor | None = None,
) -> None:
    """Attention over the union of two sets of tokens, in place; the second one is in a rotated basis.

    Args:
        out: [tokens, H * group, D] float, heads and channels contiguous; lse: float32 [tokens, H * group], natural,
            -inf of no tokens, any strides. Both are written to.
        found, found_lse: the same of N tokens, channels contiguous.
        basis: float32 [H, D, D], contiguous: `found` times this is in the basis of `out`.
        places: int64 [N], contiguous, different rows of `out`; None: the first N.

    Raises:
        ValueError: shapes or types.
    """
    heads, dim = basis.shape[:2]
    if basis.shape[2] != dim or basis.dtype != torch.float32 or not basis.is_contiguous():
        raise ValueError(f"basis must be contiguous float32 [H, D, D], got {basis.dtype} {tuple(basis.shape)}")
    wanted = out.shape[1:]
    if out.dim() != 3 or wanted[0] % heads or wanted[1] != dim or out.stride()[1:] != (dim, 1):
        raise ValueError(f"out must be [tokens, multiple of {heads}, {dim}], got {tuple(out.shape)}, {out.stride()}")
    if places is not None and (places.dtype != torch.int64 or not places.is_contiguous()):
        raise ValueError(f"places must be contiguous int64, got {places.dtype} with strides {places.stride()}")
    count = len(found) if places is None else len(places)
    if found.shape != (count, *wanted) or found.stride(2) != 1 or count > len(out):
        raise ValueError(f"found must be {(count, *wanted)}, channels contiguous, got {tuple(found.shape)}")
    sizes = out.shape[:2], found.shape[:2]
    if (lse.shape, found_lse.shape) != sizes or {lse.dtype, found_lse.dtype} != {torch.float32}:
        raise ValueError(f"lse and found_lse must be float32 {sizes}, got {tuple(lse.shape)} {tuple(found_lse.shape)}")
    group = wanted[0] // heads
    rows = count * group
    if rows:
        merge_rows_kernel[-(-rows // ROWS), heads](
            out, lse, found, found_lse, basis, out if places is None else places, rows,
            out.stride(0), *lse.stride(), *found.stride()[:2], *found_lse.stride(),
            GROUP=group, ROWS=ROWS, DIM=dim, COLUMNS=min(COLUMNS, padded(dim)), PART=PART,
            PLACED=places is not None, num_warps=WARPS,
        )  # fmt: skip
