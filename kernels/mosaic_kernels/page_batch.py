"""What a decode step reads of the compressed pages: planned once a step, used by every layer.

An **item** is the pages of one request that share an epoch: they have one rotated query and one rotated output. The
pages of an item are cut into **pieces** of about the same length, so that a batch of one and a batch of many, of any
lengths, keep the whole device busy; every piece has a program per KV head. Grids have the size of the planned capacity,
and programs beyond the pieces there are return at once: a CUDA graph replays any plan that fits.

Source of the plan-then-run interface and of the split over the context: FlashInfer (arXiv 2501.01005).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch

ITEM, FIRST, LAST = 0, 1, 2
"""Columns of `pieces`."""


LEAST_PAGES, LEAST_SCANNED = 2, 16
"""Of a piece, for which its fixed costs are small: where all is read; where tokens are selected, which costs more per
piece and less per page."""


class Item(NamedTuple):
    """Pages of one request that share an epoch."""

    request: int
    epoch: int
    frames: Sequence[int] | torch.Tensor


class PageBatch(NamedTuple):
    """Planned reads; device tensors that every layer shares."""

    frames: torch.Tensor
    """int32 [pages], those of the items one after the other."""
    epochs: torch.Tensor
    """int32 [items]."""
    requests: torch.Tensor
    """int32 [items], rising."""
    pieces: torch.Tensor
    """int32 [capacity, 3]: item, first page and page after the last among `frames`; item -1: nothing."""
    first_page: torch.Tensor
    """int32 [items + 1]: where an item's pages begin."""
    first_piece: torch.Tensor
    """int32 [items + 1]: where an item's pieces begin."""
    first_item: torch.Tensor
    """int32 [requests + 1]: where a request's items begin."""

    @property
    def capacity(self) -> int:
        """Pieces that there are buffers for."""
        return len(self.pieces)


class Cuts(NamedTuple):
    """Items of some lengths, laid out one after the other and cut into pieces."""

    pieces: list[tuple[int, int, int]]
    """As `PageBatch.pieces`."""
    first_piece: list[int]
    """By item, and their number."""
    first: list[int]
    """Where each item begins, and the end."""


SPARE_SHARE, SIZES = 4, 4
"""Pieces get longer by up to a SPARE_SHARE-th, in so many steps, if there are no more than programs then."""


def piece_size(lengths: Sequence[int], heads: int, programs: int, least: int) -> int:
    """How long pieces are at most, all of about this length.

    Items that are cut have a shorter rest each, so that there would be more pieces than programs: the last of them
    would have the device for themselves. Where little more length avoids that, pieces have it.
    """
    even = size = max(-(-sum(lengths) * heads // programs), least)
    for _ in range(SIZES):
        count = heads * sum(-(-length // size) for length in lengths)
        if count > programs:
            size = max(-(-size * count // programs), size + 1)
    return size if size <= even + even // SPARE_SHARE else even


def cut(lengths: Sequence[int], heads: int, programs: int, least: int, capacity: int | None) -> Cuts:
    """Pieces of at least `least` where an item has as many, about `programs` of them over all KV heads; see `plan`.

    Raises:
        ValueError: more pieces than `capacity`.
    """
    size = piece_size(lengths, heads, programs, least)
    cuts = Cuts([], [0], [0])
    for item, length in enumerate(lengths):
        # As even as possible: the longest piece is what a step waits for.
        count = -(-length // size)
        borders = [cuts.first[-1] + length * n // count for n in range(count + 1)] if count else []
        cuts.pieces.extend((item, first, last) for first, last in itertools.pairwise(borders))
        cuts.first_piece.append(len(cuts.pieces))
        cuts.first.append(cuts.first[-1] + length)
    if capacity is not None:
        if len(cuts.pieces) > capacity:
            raise ValueError(f"the batch has {len(cuts.pieces)} pieces, capacity is {capacity}")
        cuts.pieces.extend([(-1, 0, 0)] * (capacity - len(cuts.pieces)))
    return cuts


def plan(
    items: Sequence[Item],
    requests: int,
    heads: int,
    programs: int,
    device: torch.device | str,
    least_pages: int = LEAST_PAGES,
    capacity: int | None = None,
) -> PageBatch:
    """Cut the pages of a batch into pieces.

    Args:
        items: rising requests.
        requests: of the batch; those without items have no compressed pages.
        heads: KV heads, each of which is a program of every piece.
        programs: that keep the device busy.
        least_pages: of a piece, for which its fixed costs are small.
        capacity: pieces to reserve; None: as many as there are.

    Raises:
        ValueError: a request out of order or range, or more pieces than `capacity`.
    """
    order = [item.request for item in items]
    if order != sorted(order) or any(not 0 <= request < requests for request in order):
        raise ValueError(f"items must be of rising requests 0 to {requests - 1}, got {order}")
    cuts = cut([len(item.frames) for item in items], heads, programs, least_pages, capacity)
    first_item = [sum(request < r for request in order) for r in range(requests + 1)]
    frames = [torch.as_tensor(item.frames, dtype=torch.int32) for item in items]

    def integers(values: Sequence) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    return PageBatch(
        frames=torch.cat(frames).to(device) if frames else integers([]),
        epochs=integers([item.epoch for item in items]),
        requests=integers(order),
        pieces=integers(cuts.pieces).view(-1, 3),
        first_page=integers(cuts.first),
        first_piece=integers(cuts.first_piece),
        first_item=integers(first_item),
    )
