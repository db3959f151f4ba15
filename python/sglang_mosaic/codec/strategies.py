"""The palette: what every format of a segment can do, whichever strategy it belongs to."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mosaic_kernels.segment import SegmentFormat
from mosaic_kernels.segment_decode import reference as planes_decode
from mosaic_kernels.segment_encode import choice
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


def costs(
    formats: Sequence[Format], k_rot: torch.Tensor, v_rot: torch.Tensor, k_weight: float, v_weights: Sequence[float]
) -> torch.Tensor:
    """Expected weighted squared error of every segment in every format, [N, formats] float64.

    Args:
        k_weight, v_weights: what a squared error counts: of K, and of each of the Dv channels of V.
    """
    result = torch.empty(len(k_rot), len(formats), dtype=torch.float64, device=k_rot.device)
    planes = [i for i, fmt in enumerate(formats) if isinstance(fmt, SegmentFormat)]
    if planes:
        result[:, planes] = choice.costs(k_rot, v_rot, [formats[i] for i in planes], k_weight, v_weights)
    for i in set(range(len(formats))) - set(planes):
        fmt = formats[i]
        k = topk.dropped_energy(k_rot, fmt.k_keep, (k_weight,) * fmt.k_dim)
        result[:, i] = k + topk.dropped_energy(v_rot, fmt.v_keep, v_weights)
    return result
