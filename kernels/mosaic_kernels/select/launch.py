"""Checks and grids of selection. Nothing waits for the device: room is planned for the most that may be chosen."""

from __future__ import annotations

import torch

from mosaic_kernels.attend_pages.launch import query_rows
from mosaic_kernels.page_batch import PageBatch
from mosaic_kernels.scan.keys import KEYS
from mosaic_kernels.segment_table import SegmentTable
from mosaic_kernels.select.kernel import collect_kernel, count_kernel, threshold_kernel
from mosaic_kernels.select.selection import Selected, SelectionPlan

TILE, TILE_PAGES, TILE_PIECES, WARPS = 2048, 16, 256, 4
THRESHOLD_WARPS = 1


def select(
    keys: torch.Tensor,
    page_lse: torch.Tensor,
    batch: PageBatch,
    plan: SelectionPlan,
    table: SegmentTable,
    top_p: float = 1.0,
    out: Selected | None = None,
    steps: int = 1,
) -> Selected:
    """The tokens of each item that get most attention, per KV head (select/reference.py), and the far field's logits.

    Args:
        keys: int16 [H, pages, page_size] and page_lse float32 [H, pages, group], as of `scan`.
        batch: what was scanned.
        plan: how many tokens each item may read.
        table: the layer's formats.
        top_p, steps: as of the reference.
        out: what the result is written to; None: new tensors.

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

    if out is None:
        selected = Selected(integers(heads, plan.room), integers(heads, items), torch.empty_like(page_lse))
    else:
        selected = out
    sizes = (heads, plan.room), (heads, items), tuple(page_lse.shape)
    if tuple(tuple(x.shape) for x in selected) != sizes or not all(x.is_contiguous() for x in selected):
        raise ValueError(f"out must be contiguous, {sizes}, got {[tuple(x.shape) for x in selected]}")
    # What programs add to.
    totals = torch.zeros(items * heads * KEYS, dtype=torch.int32, device=device)
    taken = selected.counts.zero_()
    if batch.capacity and items:
        counts = integers(batch.capacity, heads, KEYS)
        least, spares, above, ties = integers(4, batch.capacity, heads)
        grid = batch.capacity, heads
        count_kernel[grid](
            keys, batch.pieces, counts, totals, pages,
            HEADS=heads, T=page_size, SHARED=steps, TILE=TILE, num_warps=WARPS,
        )  # fmt: skip
        threshold_kernel[grid](
            counts, totals, batch.pieces, plan.most, least, spares, above, ties, top_p,
            HEADS=heads, TOP_P=top_p < 1, num_warps=THRESHOLD_WARPS,
        )  # fmt: skip
        collect_kernel[grid](
            keys, page_lse, batch.pieces, batch.first_piece, batch.epochs, plan.first, least, spares, above, ties,
            table.far_bias, selected.tokens, taken, selected.far, pages, plan.room, items,
            HEADS=heads, GROUP=group, ROWS=query_rows(group), T=page_size, SHARED=steps, PAGES=TILE_PAGES,
            PIECES=TILE_PIECES, num_warps=WARPS,
        )  # fmt: skip
    return selected
