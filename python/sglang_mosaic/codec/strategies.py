"""The palette: what every format of a segment can do, whichever strategy it belongs to."""

from __future__ import annotations

import torch

from mosaic_kernels.segment import SegmentFormat
from mosaic_kernels.segment_decode import reference as planes_decode
from mosaic_kernels.segment_encode import reference as planes_encode
from mosaic_kernels.topk import reference as topk
from sglang_mosaic.codec.plan import Format


def pack(fmt: Format, k_rot: torch.Tensor, v_rot: torch.Tensor, data: torch.Tensor) -> None:
    """Rotated segments [N, T, D] into zeroed bytes [N, >= segment_bytes]; the header stays as it is."""
    (planes_encode if isinstance(fmt, SegmentFormat) else topk).pack(k_rot, v_rot, fmt, data)


def decode(fmt: Format, data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 [N, >= segment_bytes] -> float32 k_rot and v_rot [N, T, D]."""
    return (planes_decode if isinstance(fmt, SegmentFormat) else topk).decode(data, fmt)


def scan(fmt: Format, data: torch.Tensor, channels: int) -> torch.Tensor:
    """Leading channels of K without refinement: uint8 [N, >= segment_bytes] -> float32 [N, T, channels]."""
    if isinstance(fmt, SegmentFormat):
        return planes_decode.decode_keys(data, fmt, refined=False, channels=channels)
    return topk.decode(data, fmt)[0][..., :channels]


def mean_values(fmt: Format, data: torch.Tensor) -> torch.Tensor:
    """Mean V: uint8 [N, >= segment_bytes] -> float32 [N, Dv]."""
    if isinstance(fmt, SegmentFormat):
        return planes_decode.decode_mean_values(data, fmt)
    return topk.decode(data, fmt)[1].mean(1)
