"""What a decode step reads of compressed pages, and for how many pages of a batch there are buffers."""

from __future__ import annotations

import enum

from sglang_mosaic.page import pages_for

MOST_PAGES = 1 << 16
"""Of a batch: 4 million tokens, those that requests share counted once for each."""


class Reading(enum.Enum):
    """What a decode step reads of compressed pages."""

    NOTHING = "dense"
    """There are none."""
    ALL = "all"
    SELECTED = "select"
    """A part, chosen in this step."""
    AS_BEFORE = "resume"
    """What an earlier step has chosen."""


def most_pages(longest: int) -> int:
    """Pages of a batch that there are buffers for, of requests of at most `longest` tokens."""
    return max(MOST_PAGES, pages_for(longest))


def room_for(requests: int, longest: int) -> int:
    """The same of a batch of so many requests."""
    return min(requests * pages_for(longest), most_pages(longest))
