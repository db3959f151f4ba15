"""Rotated pages of one layer -> bytes and the errors made, every segment in the format of its choice (torch)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch

from mosaic_kernels.segment_choice.reference import HeadChoice, choose
from mosaic_kernels.segment_error.reference import put_header, relative_error
from mosaic_kernels.topk.segment import TopKFormat
from sglang_mosaic.codec import strategies
from sglang_mosaic.codec.plan import Format, LayerPlan
from sglang_mosaic.errors import MosaicError

Chosen = tuple[int, int, torch.Tensor]
"""Head, number of a format, and the pages that have it."""


class Segments(NamedTuple):
    """Where the segments of a layer lie, and what their errors count."""

    plan: LayerPlan
    spans: Sequence[slice]
    """Of each head, its segment's bytes among the layer's."""
    v_weights: Sequence[tuple[float, ...]]
    """Of each head and channel of V."""

    @property
    def choices(self) -> list[HeadChoice]:
        """Of each head, what its segments choose from."""
        heads = zip(self.plan.heads, self.v_weights, strict=True)
        return [HeadChoice(head.formats, head.k_weight, v_weights) for head, v_weights in heads]


class Encoded(NamedTuple):
    """Pages of one layer."""

    data: torch.Tensor
    """uint8 [P, bytes of the layer]."""
    errors: torch.Tensor
    """float32 [P, H]."""
    rare: frozenset[str]
    """`rare_kind` of what their segments have."""


def encode_segments(segments: Segments, k_rot: torch.Tensor, v_rot: torch.Tensor) -> Encoded:
    """Choose formats, quantise and pack, find the errors made.

    Args:
        k_rot: float32 [H, P, T, Dk]; v_rot: float32 [H, P, T, Dv].
    """
    plan, pages = segments.plan, k_rot.shape[1]
    data = torch.zeros(pages, plan.nbytes, dtype=torch.uint8, device=k_rot.device)
    errors = torch.zeros(len(plan.heads), pages, device=k_rot.device)
    rare: frozenset[str] = frozenset()
    for h, i, rows in by_format(choose(k_rot, v_rot, segments.choices).T, plan):
        head, (k, v) = plan.heads[h], (k_rot[h][rows], v_rot[h][rows])
        found = torch.zeros(len(rows), head.segment_bytes, dtype=torch.uint8, device=k.device)
        strategies.pack(head.formats[i], k, v, found)
        k_coded, v_coded = strategies.decode(head.formats[i], found)
        error = relative_error(k - k_coded, v - v_coded, head.k_weight, segments.v_weights[h])
        put_header(found, i, error)
        data[rows, segments.spans[h]], errors[h, rows] = found, error
        rare |= rare_kinds([head.formats[i]])
    return Encoded(data, errors.T, rare)


def rare_kind(fmt: Format) -> str | None:
    """ "topk" or "exceptions"; None: an ordinary format, which every kernel knows."""
    if isinstance(fmt, TopKFormat):
        return "topk"
    return "exceptions" if fmt.exceptions else None


def rare_kinds(formats: Iterable[Format]) -> frozenset[str]:
    """`rare_kind` of those that have one."""
    return frozenset(kind for fmt in formats if (kind := rare_kind(fmt)) is not None)


def by_format(choices: torch.Tensor, plan: LayerPlan) -> Iterator[Chosen]:
    """Every combination of a head and a format that occurs.

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
