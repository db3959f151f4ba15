"""Checks and grids of selection. Nothing waits for the device: room is planned for the most that may be chosen."""

from __future__ import annotations

import torch

from mosaic_kernels.attend_pages.launch import query_rows
from mosaic_kernels.page_batch import PageBatch
from mosaic_kernels.scan.keys import KEYS
from mosaic_kernels.segment_table import SegmentTable
from mosaic_kernels.select.kernel import collect_kernel, count_kernel, threshold_kernel
from mosaic_kernels.select.selection import Selected, SelectionPlan

TILE, TILE_PAGES, TILE_PIECES, WARPS = 2048, 16, 16, 4


def select(
    keys: torch.Tensor,
    page_lse: torch.Tensor,
    batch: PageBatch,
    plan: SelectionPlan,
    table: SegmentTable,
    top_p: float = 1.0,
) -> Selected:
    """The tokens of each item that get most attention, per KV head (select/reference.py), and the far field's logits.

    Args:
        keys: int16 [H, pages, page_size] and page_lse float32 [H, pages, group], as of `scan`.
        batch: what was scanned.
        plan: how many tokens each item may read.
        table: the layer's formats.
        top_p: as of the reference.

    Raises:
        ValueError: shapes do not fit.
    """
    heads, pages, page_size = keys.shape
    group, items = page_lse.shape[2], len(batch.epochs)
    if (heads, page_size) != (table.heads, table.page_size) or pages != len(batch.frames) or len(plan.most) != items:
        raise ValueError(
            f"keys {tuple(keys.shape)} and a plan of {len(plan.most)} items do not fit a batch of {len(batch.frames)} "
            f"pages and {items} items, {table.heads} heads and pages of {table.page_size}"
        )
    device = keys.device

    def integers(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=torch.int32, device=device)

    selected = Selected(integers(heads, plan.room), integers(heads, items), torch.empty_like(page_lse))
    if batch.capacity and items:
        counts, least = integers(batch.capacity, heads, KEYS), integers(items, heads)
        starts, spares = integers(batch.capacity, heads), integers(batch.capacity, heads)
        grid = batch.capacity, heads
        count_kernel[grid](keys, batch.pieces, counts, pages, HEADS=heads, T=page_size, TILE=TILE, num_warps=WARPS)
        threshold_kernel[items, heads](
            counts, batch.first_piece, plan.most, least, starts, spares, selected.counts, top_p,
            HEADS=heads, PIECES=TILE_PIECES, TOP_P=top_p < 1, num_warps=2 * WARPS,
        )  # fmt: skip
        collect_kernel[grid](
            keys, page_lse, batch.pieces, batch.epochs, plan.first, least, starts, spares, table.far_bias,
            selected.tokens, selected.far, pages, plan.room,
            HEADS=heads, GROUP=group, ROWS=query_rows(group), T=page_size, PAGES=TILE_PAGES, num_warps=WARPS,
        )  # fmt: skip
    return selected
