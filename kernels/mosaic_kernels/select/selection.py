"""Which tokens a step reads of each item and KV head: planned room, and what was chosen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from mosaic_kernels.page_batch import cut


class SelectionPlan(NamedTuple):
    """Room for the selected tokens of every item, and their pieces; device tensors that every layer shares."""

    most: torch.Tensor
    """int32 [items], tokens at most."""
    first: torch.Tensor
    """int32 [items + 1], where an item's tokens begin in the lists."""
    pieces: torch.Tensor
    """int32 [capacity, 3]: item, first token and token after the last in the lists; item -1: nothing."""
    first_piece: torch.Tensor
    """int32 [items + 1]."""
    room: int
    """Tokens of a list."""


class Selected(NamedTuple):
    """Result of `select`."""

    tokens: torch.Tensor
    """int32 [H, room]: page among the batch's * page_size + token."""
    counts: torch.Tensor
    """int32 [H, items]: how many of an item's room are taken."""
    far: torch.Tensor
    """float32 [H, pages, group]: logits of what each page keeps unselected, bias included; -inf: none."""


def plan_selection(
    most: Sequence[int],
    heads: int,
    programs: int,
    device: torch.device | str,
    least_tokens: int = 64,
    capacity: int | None = None,
) -> SelectionPlan:
    """
    Args:
        most: tokens that each item may read per KV head.
        heads, programs, capacity: as of `page_batch.plan`.
        least_tokens: of a piece.

    Raises:
        ValueError: more pieces than `capacity`.
    """
    cuts = cut(most, heads, programs, least_tokens, capacity)

    def integers(values: Sequence) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    return SelectionPlan(
        integers(most),
        integers(cuts.first),
        integers(cuts.pieces).view(-1, 3),
        integers(cuts.first_piece),
        cuts.first[-1],
    )
