"""Checks and grid of the scan."""

from __future__ import annotations

import torch

from mosaic_kernels.attend_pages.launch import check_queries, digit_rows, query_rows
from mosaic_kernels.page_batch import PageBatch
from mosaic_kernels.scan.kernel import scan_kernel
from mosaic_kernels.segment_table import BYTE_KEYS, SegmentTable, check_frames, padded

WARPS, STAGES = 1, 1  # sums over a page then cross no barrier
REGISTERS = 255
"""Of a thread, at most, where bytes are read: no limit, but told of one, the compiler does not save them by waiting
with loads."""


def scan(
    q: torch.Tensor,
    data: torch.Tensor,
    known_lse: torch.Tensor,
    batch: PageBatch,
    table: SegmentTable,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What each item's query finds in the base planes of the leading channels of its pages.

    Args:
        q: float32 [items, H, group, k_dim], rotated with the item's epoch.
        data: uint8 [frames of the pool, frame_bytes].
        known_lse: float32 [requests, H * group], natural log-sum-exp of the tokens that are read anyway.
        batch: what to read.
        table: the layer's formats.
        scale: factor of the logits.

    Returns:
        keys int16 [H, pages, page_size] (keys.py) and the natural log-sum-exp of every page's logits, float32
        [H, pages, group].

    Raises:
        ValueError: shapes or types.
    """
    check_frames(data, batch.frames, table)
    check_queries(q, batch, table)
    group, pages = q.shape[2], len(batch.frames)
    if known_lse.shape[1:] != (table.heads * group,) or known_lse.dtype != torch.float32:
        raise ValueError(
            f"known_lse must be float32 [requests, {table.heads * group}], got {known_lse.dtype} "
            f"{tuple(known_lse.shape)}"
        )
    keys = torch.empty(table.heads, pages, table.page_size, dtype=torch.int16, device=q.device)
    page_lse = torch.empty(table.heads, pages, group, device=q.device)
    if batch.capacity:
        scanned = max(padded(table.most_scanned), 16)
        as_bytes = table.read_as_bytes and scanned >= BYTE_KEYS
        scan_kernel[batch.capacity, table.heads](
            q, data, data.stride(0), batch.frames, batch.pieces, batch.epochs, batch.requests,
            table.starts, table.scan_channels, table.scalars, table.k_bytes if as_bytes else table.k_words,
            known_lse, keys, page_lse, pages, scale,
            HEADS=table.heads, GROUP=group, R=digit_rows(group) if as_bytes else query_rows(group),
            FORMATS=table.formats, T=table.page_size, DS=scanned, K_DIM=table.k_dim, DK=padded(table.k_dim),
            BYTES=as_bytes, ANY_TOPK=table.any_topk, ANY_EXCEPTIONS=table.any_exceptions,
            maxnreg=REGISTERS if as_bytes else None, num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip
    return keys, page_lse
