"""SGLang's page allocator, with every page that it hands out or takes back reported to the page memory.

Its accounting is untouched. The free list lives on the device, so a host mirror follows it: allocation pops from the
front, release pushes to the front, and reading pages back from the device is needed for released ones only, unless they
are those of a node of the tree.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from sglang_mosaic.adapter.node_pages import NodePages
from sglang_mosaic.cache.host_page import HostPage
from sglang_mosaic.errors import InvariantError
from sglang_mosaic.page import PAGE_SIZE, pages_for


@functools.cache
def with_page_events(base: type) -> type:
    """Subclass of the paged allocator ``base`` that drives ``kvcache.memory``."""

    class MosaicAllocator(base):  # type: ignore[misc, valid-type]
        _released: list[int] | None = None
        """Pages of the slots that are being freed, where they are known."""

        def alloc(self, need_size: int) -> torch.Tensor | None:
            before = len(self.free_pages)
            slots = super().alloc(need_size)
            if slots is not None:
                self._taken(before, ())
            return slots

        def alloc_extend(self, prefix_lens, prefix_lens_cpu, seq_lens, seq_lens_cpu, *args, **kwargs):
            before = len(self.free_pages)
            slots = super().alloc_extend(prefix_lens, prefix_lens_cpu, seq_lens, seq_lens_cpu, *args, **kwargs)
            if slots is not None:
                self._taken(before, first_new_pages(prefix_lens_cpu.tolist(), seq_lens_cpu.tolist()))
            return slots

        def alloc_decode(self, *args: Any, **kwargs: Any):
            before = len(self.free_pages)
            slots = super().alloc_decode(*args, **kwargs)
            if slots is not None:
                self._taken(before, ())
            return slots

        def alloc_restored(self, contents: Sequence[HostPage], sequence_start: bool) -> torch.Tensor:
            """Slots of pages that come back from the host, int64 [pages * 64].

            Args:
                contents: at most as many as pages are available, and `PageMemory.restorable` all of them.
                sequence_start: the first page starts a sequence.
            """
            slots = super().alloc(len(contents) * PAGE_SIZE)
            pages = [self._mirror.pop() for _ in contents]
            self._kvcache.memory.restore(pages, contents, sequence_start)
            return slots

        def _taken(self, free_before: int, sink_positions) -> None:
            count = free_before - len(self.free_pages)
            if count:
                pages = [self._mirror.pop() for _ in range(count)]
                self._kvcache.memory.allocate(pages, [pages[i] for i in sink_positions])

        def free_segment(self, free_index: torch.Tensor, *, start_pos: int) -> None:
            self._released = NodePages.of(free_index)
            super().free_segment(free_index, start_pos=start_pos)
            self._released = None

        def _release_page_ids(self, *page_ids: torch.Tensor) -> None:
            super()._release_page_ids(*page_ids)
            pages = torch.cat(page_ids).tolist() if self._released is None else self._released
            self._mirror.extend(reversed(pages))
            self._kvcache.memory.free(pages)

        def clear(self) -> None:
            super().clear()
            self._mirror = self.free_pages.tolist()[::-1]
            self._kvcache.memory.clear()

        def host_free_pages(self) -> list[int]:
            """The free list, front first, without reading the device."""
            return self._mirror[::-1]

        def audited_free_pages(self) -> list[int]:
            """The free list, front first, read from the device.

            Raises:
                InvariantError: the host has another one.
            """
            pages, mirrored = self.free_pages.tolist(), self.host_free_pages()
            if pages != mirrored:
                raise InvariantError(
                    f"the free list has {len(pages)} pages on the device, first {pages[:8]}, and {len(mirrored)} on "
                    f"the host, first {mirrored[:8]}"
                )
            return pages

    return MosaicAllocator


def first_new_pages(prefix_lens: list[int], seq_lens: list[int]) -> list[int]:
    """Positions, among the pages one ``alloc_extend`` hands out, of pages that start a sequence.

    Args:
        prefix_lens, seq_lens: tokens of each request before and after the extension.
    """
    positions, taken = [], 0
    for prefix, total in zip(prefix_lens, seq_lens, strict=True):
        if prefix == 0 and total > 0:
            positions.append(taken)
        taken += pages_for(total) - pages_for(prefix)
    return positions
