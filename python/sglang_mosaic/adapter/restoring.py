"""Which evicted pages are brought back for a request, and how long it waits for them."""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Callable
from typing import Any

from sglang_mosaic.adapter.compat import Tenant
from sglang_mosaic.page import PAGE_SIZE

UNKNOWN_S = 2.0
"""Wait for pages as long as nobody knows how long computing them takes."""


@dataclasses.dataclass
class Restoring:
    """A request in the queue that waits for pages."""

    tokens: array[int]
    """From the start of the sequence to the end of the last page wanted."""
    tenant: Tenant
    priority: int
    first: int
    """Pages that the tree had at first."""
    at: int = 0
    """Pages that the tree has."""
    restored: int = 0
    found: int = 0
    """Pages that somebody else brought meanwhile."""

    def __post_init__(self) -> None:
        self.at = self.first

    def key(self, pages: int) -> Any:
        """RadixKey of the first pages of the sequence."""
        return self.tenant.key(self.tokens[: pages * PAGE_SIZE])


class RestoringPays:
    """Restoring against computing again, as measured by this server.

    Args:
        least_tokens: a shorter run of tokens is computed.
        prefill_s: seconds of computing so many tokens that read so many compressed pages, None: not known yet.
        restore_s: seconds that so many pages take to come back, None: not known yet.
    """

    def __init__(
        self,
        least_tokens: int,
        prefill_s: Callable[[int, int], float | None],
        restore_s: Callable[[int], float | None],
    ) -> None:
        self._least_tokens = least_tokens
        self._prefill_s = prefill_s
        self._restore_s = restore_s

    def enough(self, pages: int) -> bool:
        """Whether they are a run of tokens that is restored at all."""
        return pages * PAGE_SIZE >= max(self._least_tokens, 1)

    def budget_s(self, pages: int, ahead: int, at: int, rest: int) -> float | None:
        """How long to wait for pages at most: as long as computing them takes. None: compute them.

        Args:
            ahead: pages that others wait for; they come first.
            at: pages before them that are there, compressed like those that come back.
            rest: tokens behind them, which are computed in any case.
        """
        computed, restored = self._prefill_s(pages * PAGE_SIZE + rest, at), self._prefill_s(rest, at + pages)
        if computed is None or restored is None:
            return UNKNOWN_S
        saved = computed - restored
        return None if saved <= 0 or (self._restore_s(ahead + pages) or 0.0) > saved else saved
