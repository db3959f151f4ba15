"""Checks and grid of attention over whole pages."""

from __future__ import annotations

import torch

from mosaic_kernels.attend_pages.any_kernel import attend_any_pages_kernel
from mosaic_kernels.attend_pages.kernel import attend_pages_kernel
from mosaic_kernels.page_batch import PageBatch
from mosaic_kernels.segment_table import BYTE_KEYS, BYTE_VALUES, MOST_GROUP, SegmentTable, check_frames, padded

# The fewest instructions per page: what one warp unpacks of K is where its tensor core wants it (docs/kernels.md).
WARPS, STAGES = 1, 1
TILE = 32
"""Tokens at a time of segments of any kind; others are read by the page."""


def query_rows(group: int) -> int:
    """Query heads of a KV head, filled up to what a tensor core multiplies."""
    return 8 if group <= 8 else MOST_GROUP


def digit_rows(group: int) -> int:
    """The same where each has two digits."""
    return max(padded(group), 4)


def attend_pages(
    q: torch.Tensor, data: torch.Tensor, batch: PageBatch, table: SegmentTable, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of each item's query over all tokens of its pages, piece by piece.

    Args:
        q: float32 [items, H, group, k_dim], rotated with the item's epoch; group is 1 to 16.
        data: uint8 [frames of the pool, frame_bytes].
        batch: what to read.
        table: the layer's formats.
        scale: factor of the logits.

    Returns:
        out float32 [capacity, H, group, v_dim], rotated, and lse float32 [capacity, H, group] of every piece; those of
        pieces that are not there are arbitrary.

    Raises:
        ValueError: shapes or types.
    """
    check_frames(data, batch.frames, table)
    check_queries(q, batch, table)
    group = q.shape[2]
    out = torch.empty(batch.capacity, table.heads, group, table.v_dim, device=q.device)
    lse = torch.empty(batch.capacity, table.heads, group, device=q.device)
    if not batch.capacity:
        return out, lse
    grid = batch.capacity, table.heads
    inputs = q, data, data.stride(0), batch.frames, batch.pieces, batch.epochs, table.starts, table.scalars
    sizes = {
        "HEADS": table.heads, "GROUP": group, "FORMATS": table.formats, "T": table.page_size, "DK": padded(table.k_dim),
        "K_DIM": table.k_dim, "DV": padded(table.v_dim), "V_DIM": table.v_dim,
    }  # fmt: skip
    results, options = (out, lse, scale), {"num_warps": WARPS, "num_stages": STAGES}
    if table.read_as_bytes and sizes["DK"] >= BYTE_KEYS and sizes["DV"] >= BYTE_VALUES:
        attend_pages_kernel[grid](
            *inputs, table.k_bytes, table.v_bytes, *results, R=digit_rows(group), **sizes, **options
        )
    else:
        attend_any_pages_kernel[grid](
            *inputs, table.k_words, table.v_words, *results, ROWS=query_rows(group), TILE=min(TILE, table.page_size),
            ANY_TOPK=table.any_topk, ANY_EXCEPTIONS=table.any_exceptions, **sizes, **options,
        )  # fmt: skip
    return out, lse


def check_queries(q: torch.Tensor, batch: PageBatch, table: SegmentTable) -> None:
    """
    Raises:
        ValueError: `q` is not a contiguous float32 [items, H, 1 to 16, k_dim].
    """
    wanted = len(batch.epochs), table.heads, table.k_dim
    if q.dim() != 4 or (*q.shape[:2], q.shape[3]) != wanted or not 1 <= q.shape[2] <= MOST_GROUP:
        raise ValueError(f"q must be [{wanted[0]}, {wanted[1]}, 1 to {MOST_GROUP}, {wanted[2]}], got {tuple(q.shape)}")
    if q.dtype != torch.float32 or not q.is_contiguous():
        raise ValueError(f"q must be contiguous float32, got {q.dtype} with strides {q.stride()}")
