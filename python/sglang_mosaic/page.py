"""A page: 64 consecutive tokens of one sequence, the unit of allocation, compression and sharing."""

from enum import IntEnum

PAGE_SIZE = 64
"""Tokens per page. A KV slot index is ``page * PAGE_SIZE + offset``, as in SGLang's paged allocator."""

RESERVED_PAGE = 0
"""Logical page for the writes of padded tokens; always mapped to dense frame 0, never allocated."""

UNMAPPED = -1
"""Page-table entry of a page that has no frame."""


class PageState(IntEnum):
    """Life of a logical page, in the order in which it is lived."""

    FREE = 0
    """Owned by SGLang's free list; has no frame."""
    OPEN = 1
    """Allocated and not yet full: the forwards to come write to its dense frame."""
    SEALED = 2
    """Full, and the forward that wrote its last token has been launched; still dense, may be encoded."""
    ENCODING = 3
    """A mosaic frame is reserved; encoding and publication happen at the next forward boundary."""
    MOSAIC = 4
    """Published: the page table points to the mosaic frame, the dense frame is reused."""


def pages_for(tokens: int) -> int:
    """Pages needed to hold ``tokens`` tokens that start on a page border."""
    return -(-tokens // PAGE_SIZE)
