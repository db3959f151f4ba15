"""Checks and grid of the choice."""

from __future__ import annotations

import torch

from mosaic_kernels.segment import GROUP
from mosaic_kernels.segment_choice.kernel import choose_kernel
from mosaic_kernels.segment_choice.table import ChoiceTable
from mosaic_kernels.segment_table import SegmentTable, check_rotated, padded

WARPS, EXACT_WARPS = 8, 8


def choose(
    k_rot: torch.Tensor, v_rot: torch.Tensor, costs: ChoiceTable, table: SegmentTable, epoch: int = 0
) -> torch.Tensor:
    """The format of every segment, the same as `reference.choose`. Two launches at most; nothing waits for the device.

    Args:
        k_rot: float32 [H, P, page_size, k_dim] and v_rot [H, P, page_size, v_dim], contiguous, of `rotate_pages`.
        costs: what errors cost.
        table: the layer's formats. Of those that it holds for impossible none is chosen.
        epoch: index among the table's epochs.

    Returns:
        int32 [H, P].

    Raises:
        ValueError: shapes or types.
    """
    check_rotated(k_rot, v_rot, table)
    heads, pages, page_size, _ = k_rot.shape
    shape = heads, (table.k_dim + table.v_dim) // GROUP, padded(table.formats)
    if costs.shares.shape != shape:
        raise ValueError(f"costs must be of the table's formats, {shape}, got {tuple(costs.shares.shape)}")
    numbers = torch.empty(heads, pages, dtype=torch.int32, device=k_rot.device)
    # What the first leaves open, if anything, the second decides.
    for exact, warps in ((False, WARPS), (True, EXACT_WARPS))[: 1 + table.any_topk]:
        if pages:
            choose_kernel[pages, heads](
                k_rot, v_rot, numbers, table.scalars, costs.shares, costs.k_weights, costs.v_roots, epoch, pages,
                HEADS=heads, FORMATS=table.formats, PADDED=padded(table.formats), T=page_size,
                DK=padded(table.k_dim), K_DIM=table.k_dim, DV=padded(table.v_dim), V_DIM=table.v_dim,
                ANY_TOPK=table.any_topk, ANY_EXCEPTIONS=table.any_exceptions, EXACT=exact,
                num_warps=warps, enable_fp_fusion=False,
            )  # fmt: skip
    return numbers
