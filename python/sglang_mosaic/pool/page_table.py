"""Logical page -> frame, on the device at a fixed address."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from mosaic_kernels.upload import upload
from sglang_mosaic.page import PAGE_SIZE, RESERVED_PAGE, UNMAPPED


class PageTable:
    """Frame number of each logical page, int64 ``[logical_pages + 1]``.

    Frame numbers of both kinds share one space: 0 .. dense_frames are dense (0 belongs to the reserved page for ever),
    larger ones are mosaic. Every layer uses the same number. Only ``update`` writes, and only between two forwards.
    """

    def __init__(self, logical_pages: int, dense_frames: int, device: torch.device | str) -> None:
        self.first_mosaic = dense_frames + 1
        self.frames = torch.full((logical_pages + 1,), UNMAPPED, dtype=torch.int64, device=device)
        self.frames[RESERVED_PAGE] = 0

    def update(self, entries: Mapping[int, int]) -> None:
        """Set ``page -> frame`` for every entry, in the order of the current stream."""
        if not entries:
            return
        both = torch.tensor([list(entries), list(entries.values())], dtype=torch.int64)
        both = upload(both, self.frames.device)
        self.frames[both[0]] = both[1]

    def dense_slots(self, slots: torch.Tensor) -> torch.Tensor:
        """Rows of the dense slab for logical slots whose pages are dense.

        Args:
            slots: any shape, integer; ``page * 64 + offset``.

        Returns:
            int64, same shape. Slots of unmapped or mosaic pages give rows that are out of range on purpose.
        """
        slots = slots.to(torch.int64)
        return self.frames[slots // PAGE_SIZE] * PAGE_SIZE + slots % PAGE_SIZE
