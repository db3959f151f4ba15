"""Pages that nobody may write to any more, watched: their bytes must stay what they were.

Frames of one page are read by many requests. A kernel that writes past its own, or a frame given away too early, would
show in other people's answers only; here it shows as a page that changed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch

from sglang_mosaic.errors import InvariantError
from sglang_mosaic.page import PageState

if TYPE_CHECKING:
    from sglang_mosaic.cache.memory import PageMemory

AT_A_TIME = 8
"""Pages looked at again, and pages taken in, by one check: the time that it takes does not grow with the pool."""


class _Seen(NamedTuple):
    frame: int
    checksum: int


class PageCanary:
    """
    Args:
        memory: whose pages are watched.
    """

    def __init__(self, memory: PageMemory) -> None:
        self._memory = memory
        self._seen: OrderedDict[int, _Seen] = OrderedDict()  # the one looked at longest ago first

    def forget(self, pages: Iterable[int]) -> None:
        """Pages were freed: whatever is in their frames next is another page."""
        for page in pages:
            self._seen.pop(page, None)

    def clear(self) -> None:
        """All pages were freed."""
        self._seen.clear()

    def check(self) -> None:
        """Look at some pages again, and at some for the first time. What was launched must have run.

        Raises:
            InvariantError: names the first page that changed.
        """
        at_rest = self._at_rest()
        for page, seen in list(self._seen.items()):
            if at_rest.get(page) != seen.frame:
                del self._seen[page]  # compressed meanwhile
        again = list(self._seen)[:AT_A_TIME]
        first = [page for page in at_rest if page not in self._seen][:AT_A_TIME]
        pages = again + first
        checksums = self._checksums([at_rest[page] for page in pages])
        for page, checksum in zip(pages, checksums, strict=True):
            before = self._seen.get(page)
            if before is not None and before.checksum != checksum:
                state = self._memory.lifecycle.state[page].name
                raise InvariantError(f"page {page} ({state}, frame {before.frame}) changed, and nobody may write to it")
            self._seen[page] = _Seen(at_rest[page], checksum)
            self._seen.move_to_end(page)

    def _at_rest(self) -> dict[int, int]:
        """Frames of the pages that nothing under way or decided will write to."""
        pages = self._memory.lifecycle
        pending = pages.pending_pages
        full = (PageState.SEALED, PageState.MOSAIC)
        return {
            page: pages.frame[page] for page, state in enumerate(pages.state) if state in full and page not in pending
        }

    def _checksums(self, frames: list[int]) -> list[int]:
        memory = self._memory
        sums: dict[int, int] = {}
        dense = [frame for frame in frames if frame < memory.table.first_mosaic]
        mosaic = [frame for frame in frames if frame >= memory.table.first_mosaic]
        device = memory.table.frames.device
        if dense:
            rows = torch.tensor(dense, device=device)
            layers = [x for layer in range(len(memory.dense_k)) for x in memory.dense_rows(layer, rows)]
            # One after the other, in an order: a value that moves from one layer to another changes the sum.
            total = torch.zeros(len(dense), dtype=torch.int64, device=device)
            for x in layers:
                total = total * 31 + _weighted(x.contiguous().view(torch.int16).flatten(1))
            sums |= dict(zip(dense, total.tolist(), strict=True))
        if mosaic:
            rows = torch.tensor(mosaic, device=device) - memory.table.first_mosaic
            sums |= dict(zip(mosaic, _weighted(memory.slab.frames[rows]).tolist(), strict=True))
        return [sums[frame] for frame in frames]


def _weighted(values: torch.Tensor) -> torch.Tensor:
    """int64 [rows] of any integers [rows, columns]. Odd weights: no change of a single value goes unseen."""
    weights = torch.arange(1, 2 * values.shape[1], 2, device=values.device)
    return (values.long() * weights).sum(1)
