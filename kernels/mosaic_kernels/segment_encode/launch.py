"""Checks and grid of the encoder."""

from __future__ import annotations

import torch

from mosaic_kernels.segment_encode.kernel import encode_kernel
from mosaic_kernels.segment_table import SegmentTable, padded

WARPS = 8


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
        data: uint8 [P, bytes], zeroed, one row a page; segments begin where the table says.
        table: the layer's formats.
        epoch: index among the table's epochs.

    Raises:
        ValueError: shapes or types.
    """
    heads, pages, page_size, _ = k_rot.shape
    wanted = [(heads, pages, page_size, dim) for dim in (table.k_dim, table.v_dim)]
    if (heads, page_size) != (table.heads, table.page_size) or [k_rot.shape, v_rot.shape] != wanted:
        raise ValueError(f"k_rot and v_rot must be {wanted[0]} and {wanted[1]}, got {k_rot.shape} and {v_rot.shape}")
    for name, x in (("k_rot", k_rot), ("v_rot", v_rot)):
        if x.dtype != torch.float32 or not x.is_contiguous():
            raise ValueError(f"{name} must be contiguous float32, got {x.dtype} with strides {x.stride()}")
    if numbers.shape != (heads, pages) or numbers.dtype != torch.int32 or not numbers.is_contiguous():
        raise ValueError(f"numbers must be contiguous int32 [{heads}, {pages}], got {numbers.dtype} {numbers.shape}")
    if data.dim() != 2 or len(data) != pages or data.dtype != torch.uint8 or data.stride(1) != 1:
        raise ValueError(f"data must be uint8 [{pages}, bytes], got {data.dtype} {tuple(data.shape)}")
    if pages:
        encode_kernel[pages, heads, 2](
            k_rot, v_rot, data, data.stride(0), numbers, table.starts, table.scalars,
            table.k_words, table.v_words, epoch, pages,
            HEADS=heads, FORMATS=table.formats, T=page_size,
            DK=padded(table.k_dim), K_DIM=table.k_dim, DV=padded(table.v_dim), V_DIM=table.v_dim,
            num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip
