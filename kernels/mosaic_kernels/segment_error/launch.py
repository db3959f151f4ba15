"""Checks and grid of the errors."""

from __future__ import annotations

import torch

from mosaic_kernels.segment_choice.table import ChoiceTable
from mosaic_kernels.segment_error.kernel import error_kernel
from mosaic_kernels.segment_table import SegmentTable, check_encoded, check_rotated, padded

TILE, WARPS = 64, 4  # tokens that a program decodes at a time at most


def write_errors(
    k_rot: torch.Tensor,
    v_rot: torch.Tensor,
    numbers: torch.Tensor,
    data: torch.Tensor,
    costs: ChoiceTable,
    table: SegmentTable,
    epoch: int = 0,
) -> torch.Tensor:
    """Decode encoded pages again, and write the headers of their segments: format and error (`reference.py`).

    One launch; nothing waits for the device.

    Args:
        k_rot: float32 [H, P, page_size, k_dim] and v_rot [H, P, page_size, v_dim], contiguous: what was encoded.
        numbers: int32 [H, P], format of each segment among its head's.
        data: uint8 [P, bytes], rows aligned to 16 bytes, one a page; its headers are written.
        costs: what errors cost.
        table: the layer's formats.
        epoch: index among the table's epochs.

    Returns:
        float32 [P, H], relative errors of the attention output; NaN where the table holds a format for impossible.

    Raises:
        ValueError: shapes, types or alignment.
    """
    check_rotated(k_rot, v_rot, table)
    heads, pages, page_size, _ = k_rot.shape
    check_encoded(numbers, data, pages, table, epoch)
    errors = torch.empty(pages, heads, device=data.device)
    if pages:
        error_kernel[pages, heads](
            k_rot, v_rot, data, data.stride(0), numbers, table.starts, table.scalars, table.k_words, table.v_words,
            costs.k_weights, costs.v_weights, errors, epoch, pages,
            HEADS=heads, FORMATS=table.formats, T=page_size, TILE=min(TILE, page_size),
            DK=padded(table.k_dim), K_DIM=table.k_dim, DV=padded(table.v_dim), V_DIM=table.v_dim,
            ANY_TOPK=table.any_topk, ANY_EXCEPTIONS=table.any_exceptions,
            num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return errors
