"""Encoding of rotated pages by the kernel: the same bytes as encoding.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mosaic_kernels.segment import SegmentFormat
from mosaic_kernels.segment_decode.launch import decode_frames
from mosaic_kernels.segment_encode.launch import encode_pages
from mosaic_kernels.segment_table import HeadFormats, make_table
from sglang_mosaic.codec import strategies
from sglang_mosaic.codec.encoding import Segments, put_header, relative_error


def encode_segments(
    segments: Segments,
    k_rot: torch.Tensor,
    v_rot: torch.Tensor,
    numbers: torch.Tensor,
    chosen: Sequence[tuple[int, int, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `encoding.encode_segments`.

    Args:
        numbers: integer [P, H], formats of the segments.
    """
    heads, pages = k_rot.shape[:2]
    data = torch.zeros(pages, segments.plan.nbytes, dtype=torch.uint8, device=k_rot.device)
    formats = [
        HeadFormats(span.start, head.formats) for head, span in zip(segments.plan.heads, segments.spans, strict=True)
    ]
    table = make_table([formats], data.device)
    encode_pages(k_rot, v_rot, numbers.T.int().contiguous(), data, table)
    for h, i, rows in chosen:
        head = segments.plan.heads[h]
        # Strategies that are rare have no kernel.
        if not isinstance(head.formats[i], SegmentFormat) or head.formats[i].exceptions:
            found = torch.zeros(len(rows), head.segment_bytes, dtype=torch.uint8, device=data.device)
            strategies.pack(head.formats[i], k_rot[h][rows], v_rot[h][rows], found)
            data[rows, segments.spans[h]] = found
    for h, span in enumerate(segments.spans):
        data[:, span.start] = numbers[:, h].byte()
    k_coded, v_coded = decode_frames(data, torch.arange(pages, device=data.device), table)
    errors = torch.empty(heads, pages, device=data.device)
    for h, (head, span) in enumerate(zip(segments.plan.heads, segments.spans, strict=True)):
        errors[h] = relative_error(head, segments.v_weights[h], k_rot[h] - k_coded[h], v_rot[h] - v_coded[h])
        put_header(data[:, span], numbers[:, h].byte(), errors[h])
    return data, errors.T
