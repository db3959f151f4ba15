"""Checks and grid of the encoder."""

from __future__ import annotations

import torch

from mosaic_kernels.segment_encode.kernel import encode_kernel
from mosaic_kernels.segment_table import SegmentTable, check_encoded, check_rotated, padded

TILE, WARPS, WIDE_WARPS = 16, 4, 8
"""WIDE_WARPS: of heads of more than 128 channels, whose values 4 warps cannot hold."""


def encode_pages(
    k_rot: torch.Tensor,
    v_rot: torch.Tensor,
    numbers: torch.Tensor,
    data: torch.Tensor,
    table: SegmentTable,
    epoch: int = 0,
) -> None:
    """Quantise and pack rotated pages, the same bytes as `reference.pack`.

    Only formats of planes without exceptions are written; segments of others, and headers, stay as they are.

    Args:
        k_rot: float32 [H, P, page_size, k_dim] and v_rot [H, P, page_size, v_dim], contiguous, of `rotate_pages`.
        numbers: int32 [H, P], format of each segment among its head's.
        data: uint8 [P, bytes], zeroed, rows aligned to 16 bytes, one a page; segments begin where the table says.
        table: the layer's formats.
        epoch: index among the table's epochs.

    Raises:
        ValueError: shapes, types or alignment.
    """
    check_rotated(k_rot, v_rot, table)
    heads, pages, page_size, _ = k_rot.shape
    check_encoded(numbers, data, pages, table, epoch)
    if pages:
        encode_kernel[pages, heads, 2](
            k_rot, v_rot, data, data.stride(0), numbers, table.starts, table.scalars,
            table.k_words, table.v_words, epoch, pages,
            HEADS=heads, FORMATS=table.formats, T=page_size,
            DK=padded(table.k_dim), K_DIM=table.k_dim, DV=padded(table.v_dim), V_DIM=table.v_dim,
            TILE=min(TILE, page_size), num_warps=WARPS if max(table.k_dim, table.v_dim) <= 128 else WIDE_WARPS,
            enable_fp_fusion=False,
        )  # fmt: skip
