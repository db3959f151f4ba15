"""Checks and grid of the decoder."""

from __future__ import annotations

import torch

from mosaic_kernels.segment_decode.kernel import decode_kernel
from mosaic_kernels.segment_table import SegmentTable, check_frames, padded

TILE, WARPS = 64, 4  # tokens of one program at most


def decode_frames(
    data: torch.Tensor, frames: torch.Tensor, table: SegmentTable, epoch: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of frames of one epoch, in its rotated bases.

    Args:
        data: uint8 [frames of the pool, frame_bytes], rows aligned to 16 bytes.
        frames: int32 or int64 [P], rows of `data`.
        table: the layer's formats.
        epoch: index among the table's epochs.
        dtype: of the results.

    Returns:
        k_rot [H, P, page_size, k_dim] and v_rot [H, P, page_size, v_dim]. Segments whose format has no number of the
        table are NaN.

    Raises:
        ValueError: shapes, types or alignment.
    """
    check_frames(data, frames, table, epoch)
    shape = table.heads, len(frames), table.page_size
    k_out, v_out = (torch.empty(*shape, dim, dtype=dtype, device=data.device) for dim in (table.k_dim, table.v_dim))
    tile = min(TILE, table.page_size)
    if len(frames):
        decode_kernel[len(frames), table.heads, table.page_size // tile](
            data, data.stride(0), frames, table.starts, table.scalars, table.k_words, table.v_words,
            epoch, k_out, v_out, len(frames),
            HEADS=table.heads, FORMATS=table.formats, T=table.page_size, TILE=tile,
            DK=padded(table.k_dim), K_DIM=table.k_dim, DV=padded(table.v_dim), V_DIM=table.v_dim,
            ANY_TOPK=table.any_topk, ANY_EXCEPTIONS=table.any_exceptions, num_warps=WARPS,
        )  # fmt: skip
    return k_out, v_out
