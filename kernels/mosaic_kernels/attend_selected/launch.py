"""Checks and grid of attention over selected tokens."""

from __future__ import annotations

import torch

from mosaic_kernels.attend_pages.launch import check_queries, query_rows
from mosaic_kernels.attend_selected.kernel import attend_selected_kernel
from mosaic_kernels.page_batch import PageBatch
from mosaic_kernels.segment_table import SegmentTable, check_frames, padded
from mosaic_kernels.select.selection import Selected, SelectionPlan

TILE, WARPS, STAGES = 16, 1, 1


def attend_selected(
    q: torch.Tensor,
    data: torch.Tensor,
    batch: PageBatch,
    plan: SelectionPlan,
    selected: Selected,
    table: SegmentTable,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of each item's query over its selected tokens, all planes read.

    Args:
        q: float32 [items, H, group, k_dim], rotated with the item's epoch.
        data: uint8 [frames of the pool, frame_bytes].
        batch, plan, selected: what to read.
        table: the layer's formats.
        scale: factor of the logits.

    Returns:
        out float32 [capacity of the plan, H, group, v_dim], rotated, and lse [capacity, H, group], -inf for a piece of
        which nothing was selected.

    Raises:
        ValueError: shapes or types.
    """
    check_frames(data, batch.frames, table)
    check_queries(q, batch, table)
    group, capacity = q.shape[2], len(plan.pieces)
    out = torch.empty(capacity, table.heads, group, table.v_dim, device=q.device)
    lse = torch.empty(capacity, table.heads, group, device=q.device)
    if capacity:
        attend_selected_kernel[capacity, table.heads](
            q, data, data.stride(0), batch.frames, selected.tokens, selected.counts, plan.pieces, plan.first,
            batch.epochs, table.starts, table.scalars, table.k_words, table.v_words,
            out, lse, plan.room, len(batch.epochs), scale,
            HEADS=table.heads, GROUP=group, ROWS=query_rows(group), FORMATS=table.formats, T=table.page_size,
            TILE=TILE,
            DK=padded(table.k_dim), K_DIM=table.k_dim, DV=padded(table.v_dim), V_DIM=table.v_dim,
            ANY_TOPK=table.any_topk, ANY_EXCEPTIONS=table.any_exceptions, num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip
    return out, lse
