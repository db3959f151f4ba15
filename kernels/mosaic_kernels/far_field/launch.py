"""Checks and grid of the far field."""

from __future__ import annotations

import torch

from mosaic_kernels.attend_pages.launch import query_rows
from mosaic_kernels.far_field.kernel import far_field_kernel
from mosaic_kernels.page_batch import PageBatch
from mosaic_kernels.segment_table import SegmentTable, check_frames, padded

TILE_PAGES, WARPS, STAGES = 16, 1, 1


def far_field(
    far: torch.Tensor, data: torch.Tensor, batch: PageBatch, table: SegmentTable
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over one token per page, its mean value.

    Args:
        far: float32 [H, pages, group], logits (`Selected.far`); -inf: nothing.
        data: uint8 [frames of the pool, frame_bytes].
        batch: the pages.
        table: the layer's formats.

    Returns:
        out float32 [capacity, H, group, v_dim], rotated, and lse [capacity, H, group] of every piece; -inf: nothing.

    Raises:
        ValueError: shapes or types.
    """
    check_frames(data, batch.frames, table)
    heads, pages, group = far.shape
    if (heads, pages) != (table.heads, len(batch.frames)):
        raise ValueError(f"far must be [{table.heads}, {len(batch.frames)}, group], got {tuple(far.shape)}")
    out = torch.empty(batch.capacity, heads, group, table.v_dim, device=far.device)
    lse = torch.empty(batch.capacity, heads, group, device=far.device)
    if batch.capacity:
        far_field_kernel[batch.capacity, heads](
            far, data, data.stride(0), batch.frames, batch.pieces, batch.epochs, table.starts, table.scalars,
            out, lse, pages,
            HEADS=heads, GROUP=group, ROWS=query_rows(group), FORMATS=table.formats, T=table.page_size,
            PAGES=TILE_PAGES, DV=padded(table.v_dim), V_DIM=table.v_dim, ANY_TOPK=table.any_topk,
            num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip
    return out, lse
