"""SGLang's page allocator, with every page that it hands out or takes back reported to the page memory.

Its accounting is untouched. The free list lives on the device, so a host mirror follows it: allocation pops from the
front, release pushes to the front, and reading pages back from the device is needed for released ones only, unless they
are known to be those of a node of the tree or of a request.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from sglang_mosaic.adapter import compat
from sglang_mosaic.adapter.node_pages import NodePages
from sglang_mosaic.adapter.request_pages import HandedOut, RequestPages
from sglang_mosaic.cache.host_page import HostPage
from sglang_mosaic.errors import InvariantError
from sglang_mosaic.page import PAGE_SIZE, pages_for


@functools.cache
def with_page_events(base: type) -> type:
    """Subclass of the paged allocator ``base`` that drives ``kvcache.memory``."""

    class MosaicAllocator(base):  # type: ignore[misc, valid-type]
        device_reads: int = 0
        """Releases whose pages had to be read from the device."""
        _handed_out: list[HandedOut] | None = None
        """By the last allocation for a batch."""
        owner: RequestPages | None = None
        """Pages of the request whose slots are being freed, where it is one request and they are known."""
        _released: list[int] | None = None
        """Pages of the slots that are being freed, where they are known."""
        _in_group: list[int] | None = None
        """The same of those that were freed since a group of releases began."""

        def alloc(self, need_size: int) -> torch.Tensor | None:
            before = len(self.free_pages)
            slots = super().alloc(need_size)
            if slots is not None:
                self._taken(before, ())
            return slots

        def alloc_extend(self, prefix_lens, prefix_lens_cpu, seq_lens, seq_lens_cpu, *args, **kwargs):
            before = len(self.free_pages)
            slots = super().alloc_extend(prefix_lens, prefix_lens_cpu, seq_lens, seq_lens_cpu, *args, **kwargs)
            self._handed_out = None
            if slots is not None:
                lens = prefix_lens_cpu.tolist(), seq_lens_cpu.tolist()
                self._handed_out = share_out(self._taken(before, first_new_pages(*lens)), *lens)
            return slots

        def alloc_decode(self, seq_lens, seq_lens_cpu, *args: Any, **kwargs: Any):
            before = len(self.free_pages)
            slots = super().alloc_decode(seq_lens, seq_lens_cpu, *args, **kwargs)
            self._handed_out = None
            if slots is not None:
                lens = seq_lens_cpu.tolist()
                self._handed_out = share_out(self._taken(before, ()), [length - 1 for length in lens], lens)
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

        def take_handed_out(self) -> list[HandedOut] | None:
            """What the last allocation for a batch gave to each of its requests, told once; None: it failed, or there
            was none."""
            given, self._handed_out = self._handed_out, None
            return given

        def _taken(self, free_before: int, sink_positions) -> list[int]:
            pages = [self._mirror.pop() for _ in range(free_before - len(self.free_pages))]
            if pages:
                self._kvcache.memory.allocate(pages, [pages[i] for i in sink_positions])
            return pages

        def free(self, free_index: torch.Tensor) -> None:
            known, self._released = self._released, None
            super().free(free_index)
            self._released = known

        def free_segment(self, free_index: torch.Tensor, *, start_pos: int) -> None:
            count = len(free_index)
            pages = NodePages.of(free_index)
            if pages is None and self.owner is not None and count:
                pages = self.owner.at(start_pos, count)
            if compat.in_free_group(self):
                if count:
                    together = self._in_group is not None and pages is not None
                    self._in_group = self._in_group + pages if together else None
                pages = None
            self._released = pages
            super().free_segment(free_index, start_pos=start_pos)
            self._released = None

        def free_group_begin(self) -> None:
            super().free_group_begin()
            self._in_group = []

        def free_group_end(self) -> None:
            self._released, self._in_group = self._in_group, None
            super().free_group_end()
            self._released = None

        def _release_page_ids(self, *page_ids: torch.Tensor) -> None:
            super()._release_page_ids(*page_ids)
            pages = self._released
            if pages is None or len(pages) != sum(map(len, page_ids)):
                pages = torch.cat(page_ids).tolist()
                self.device_reads += 1
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


def share_out(pages: list[int], lens_before: list[int], lens: list[int]) -> list[HandedOut]:
    """Pages that a batch was given, request by request.

    Args:
        lens_before, lens: tokens of each request before and after.
    """
    given, first = [], 0
    for before, after in zip(lens_before, lens, strict=True):
        end = first + pages_for(after) - pages_for(before)
        given.append(HandedOut(pages[first:end], pages_for(after)))
        first = end
    return given


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
