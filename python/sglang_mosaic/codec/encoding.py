"""Rotated pages of one layer -> bytes and the error made, each segment in the format chosen for it (torch reference).

Header of a segment: byte 0, number of its format; bytes 4 to 7, float32, the relative error of the attention output to
be expected if all pages had this segment's error.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from mosaic_kernels.constants import constant
from sglang_mosaic.codec import strategies
from sglang_mosaic.codec.plan import HeadPlan, LayerPlan
from sglang_mosaic.errors import MosaicError

FORMAT, ERROR = 0, 4
"""First bytes of the parts of a header."""


class Segments(NamedTuple):
    """Where the segments of a layer lie, and what their errors count."""

    plan: LayerPlan
    spans: Sequence[slice]
    """Of each head, its segment's bytes among the layer's."""
    v_weights: Sequence[tuple[float, ...]]
    """Of each head and channel of V."""


def encode_segments(
    segments: Segments,
    k_rot: torch.Tensor,
    v_rot: torch.Tensor,
    chosen: Sequence[tuple[int, int, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Args:
        k_rot: float32 [H, P, T, Dk]; v_rot: float32 [H, P, T, Dv].
        chosen: of `by_format`.

    Returns:
        uint8 [P, bytes of the layer] and float32 [P, H] errors.
    """
    heads, pages = k_rot.shape[:2]
    data = torch.zeros(pages, segments.plan.nbytes, dtype=torch.uint8, device=k_rot.device)
    errors = torch.zeros(heads, pages, device=k_rot.device)
    for h, i, rows in chosen:
        head, (k, v) = segments.plan.heads[h], (k_rot[h][rows], v_rot[h][rows])
        found = torch.zeros(len(rows), head.segment_bytes, dtype=torch.uint8, device=k.device)
        strategies.pack(head.formats[i], k, v, found)
        k_coded, v_coded = strategies.decode(head.formats[i], found)
        error = relative_error(head, segments.v_weights[h], k - k_coded, v - v_coded)
        put_header(found, i, error)
        data[rows, segments.spans[h]], errors[h, rows] = found, error
    return data, errors.T


def relative_error(
    head: HeadPlan, v_weights: tuple[float, ...], k_error: torch.Tensor, v_error: torch.Tensor
) -> torch.Tensor:
    """Errors of stored values [P, T, D] of one head -> float32 [P] of the attention output."""
    v_squares = v_error.double().square() * constant(v_weights, torch.float64, v_error.device)
    squared = k_error.double().square().sum((1, 2)) * head.k_weight + v_squares.sum((1, 2))
    # Rounded, so that the order of summation does not show in the bytes.
    return squared.sqrt().bfloat16().float()


def put_header(data: torch.Tensor, number: int | torch.Tensor, error: torch.Tensor) -> None:
    """Write the headers of segments [P, bytes]."""
    data[:, FORMAT] = number
    data[:, ERROR : ERROR + 4] = error[:, None].contiguous().view(torch.uint8)


def by_format(choices: torch.Tensor, plan: LayerPlan) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Head, number of a format, and the pages that have it, for every combination that occurs.

    Waits for the device once, whatever the number of heads and formats.

    Args:
        choices: integer [P, H].
    """
    most = max(len(head.formats) for head in plan.heads)
    numbers = torch.arange(most, device=choices.device)
    counts = (choices[:, :, None] == numbers).sum(0)
    order = choices.argsort(dim=0, stable=True)
    for h, (head, of_head) in enumerate(zip(plan.heads, counts.tolist(), strict=True)):
        if sum(of_head[: len(head.formats)]) != len(choices):
            raise MosaicError(
                f"a segment has format {int(choices[:, h].max())} of {len(head.formats)}: its frame was never encoded"
            )
        at = 0
        for i, count in enumerate(of_head):
            if count:
                yield h, i, order[at : at + count, h]
            at += count
