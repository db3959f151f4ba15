"""What a decode step reads, in buffers of fixed size and address: a CUDA graph replays whatever plan they hold."""

from __future__ import annotations

from typing import NamedTuple

import torch

from mosaic_kernels.page_batch import PageBatch
from mosaic_kernels.select.selection import SelectionPlan

DENSE_WARPS = 4
SHARE_BITS = 20
"""A share of tokens is a fraction of this many bits: whole numbers, which all devices round alike."""


class DenseBatch(NamedTuple):
    """The pages of every request that are not compressed; device tensors that every layer shares."""

    frames: torch.Tensor
    """int32 [pages], the requests' one after the other, each in the order of the sequence."""
    first_page: torch.Tensor
    """int32 [requests + 1]: where a request's pages begin."""
    tokens: torch.Tensor
    """int32 [requests]: of those pages, the last of which may be partly filled."""
    pieces: torch.Tensor
    """int32 [capacity, 3]: request, first page and page after the last among `frames`; request -1: nothing."""
    first_piece: torch.Tensor
    """int32 [requests + 1]."""


class Shape(NamedTuple):
    """Sizes of a plan's buffers."""

    requests: int
    epochs: int
    """Slots of epochs; an item is a request's pages of one slot, and only those there are have an item."""
    pages: int
    """Room for the pages of all requests together."""
    heads: int
    """KV heads, each of which is a program of every piece."""
    programs: int
    """That keep the device busy; those of uncompressed pages have DENSE_WARPS warps, and there are as many fewer."""
    page_size: int = 64
    share: float = 0.0
    """Of an item's tokens that are selected at most; 0: all are read."""
    least_selected: int = 0
    """Tokens of an item below which all of them are selected."""

    @property
    def share_units(self) -> int:
        return round(self.share * (1 << SHARE_BITS))

    @property
    def dense_programs(self) -> int:
        return max(self.programs // DENSE_WARPS, 1)

    @property
    def pieces(self) -> int:
        """As many as any batch can have."""
        return -(-self.programs // self.heads) + self.requests * self.epochs

    @property
    def room(self) -> int:
        """Tokens of a list of selected ones."""
        tokens = self.pages * self.page_size
        short = min(self.requests * self.epochs * self.least_selected, tokens)
        return (tokens * self.share_units >> SHARE_BITS) + short + self.requests * self.epochs


class StepPlan(NamedTuple):
    """Planned reads of one decode step."""

    shape: Shape
    mosaic: PageBatch
    """Its items are compact; epochs beyond the last are -1."""
    selection: SelectionPlan | None
    """None: everything is read."""
    dense: DenseBatch
    counts: torch.Tensor
    """int32 [requests, epochs + 1], pages of every epoch's slot and uncompressed ones."""


def allocate(shape: Shape, device: torch.device | str) -> StepPlan:
    """A plan's buffers, planning nothing yet."""

    def integers(*size: int) -> torch.Tensor:
        return torch.zeros(size, dtype=torch.int32, device=device)

    def pieces(count: int) -> torch.Tensor:
        return torch.full((count, 3), -1, dtype=torch.int32, device=device)

    items = shape.requests * shape.epochs
    mosaic = PageBatch(
        frames=integers(shape.pages),
        epochs=integers(items) - 1,
        requests=integers(items),
        pieces=pieces(shape.pieces),
        first_page=integers(items + 1),
        first_piece=integers(items + 1),
        first_item=integers(shape.requests + 1),
    )
    selection = None
    if shape.share:
        selection = SelectionPlan(
            integers(items), integers(items + 1), pieces(shape.pieces), integers(items + 1), shape.room
        )
    dense = DenseBatch(
        frames=integers(shape.pages),
        first_page=integers(shape.requests + 1),
        tokens=integers(shape.requests),
        pieces=pieces(shape.pieces),
        first_piece=integers(shape.requests + 1),
    )
    return StepPlan(shape, mosaic, selection, dense, integers(shape.requests, shape.epochs + 1))
