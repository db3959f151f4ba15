"""The pages behind a node of the prefix tree, known on the host before they are needed.

A node's slots lie on the device. Whoever reads them when the node is evicted waits for the prefill that runs, 15 to 47
ms for prompts of 4k to 16k tokens on an H200 (docs/manager.md); so they are read when the node is made, which nobody
waits for.
"""

from __future__ import annotations

import torch

from sglang_mosaic.page import PAGE_SIZE

_ATTRIBUTE = "mosaic_pages"


class NodePages:
    """
    Args:
        slots: int64 [pages * 64], whole pages, as of now in the current stream.
        known: these pages, if somebody knows them; then nothing is read.
    """

    def __init__(self, slots: torch.Tensor, known: list[int] | None = None) -> None:
        self.known = known
        self._done: torch.cuda.Event | None = None
        if known is not None:
            return
        pages = slots[::PAGE_SIZE] // PAGE_SIZE
        if pages.is_cuda:
            self._pages = torch.empty(pages.shape, dtype=pages.dtype, pin_memory=True)
            self._pages.copy_(pages, non_blocking=True)
            self._done = torch.cuda.current_stream(pages.device).record_event()
        else:
            self._pages = pages

    @classmethod
    def note(cls, slots: torch.Tensor, known: list[int] | None = None) -> None:
        """Remember the pages of a node's slots with the tensor; if they are not known, begin to read them."""
        setattr(slots, _ATTRIBUTE, cls(slots, known))

    @classmethod
    def of(cls, slots: torch.Tensor) -> list[int] | None:
        """Pages of slots that were noted; None: they were not."""
        noted: NodePages | None = getattr(slots, _ATTRIBUTE, None)
        return None if noted is None else noted()

    @classmethod
    def there(cls, slots: torch.Tensor) -> list[int] | None:
        """The same without waiting; None also where they are still being read."""
        noted: NodePages | None = getattr(slots, _ATTRIBUTE, None)
        return None if noted is None else noted.known

    def __call__(self) -> list[int]:
        if self.known is None:
            if self._done is not None:
                self._done.synchronize()
            self.known = self._pages.tolist()
        return self.known
