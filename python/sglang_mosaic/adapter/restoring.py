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
        prefill_rate: tokens that this server computes in a second, None: not known yet.
        page_s: seconds that a page takes to come back, None: not known yet.
        compressed_s: seconds more that a forward takes as it reads so many compressed pages.
    """

    def __init__(
        self,
        least_tokens: int,
        prefill_rate: Callable[[], float | None],
        page_s: Callable[[], float | None],
        compressed_s: Callable[[int], float],
    ) -> None:
        self._least_tokens = least_tokens
        self._prefill_rate = prefill_rate
        self._page_s = page_s
        self._compressed_s = compressed_s

    def enough(self, pages: int) -> bool:
        """Whether they are a run of tokens that is restored at all."""
        return pages * PAGE_SIZE >= max(self._least_tokens, 1)

    def budget_s(self, pages: int, ahead: int, at: int) -> float | None:
        """How long to wait for pages at most: as long as computing them takes. None: compute them.

        Args:
            ahead: pages that others wait for; they come first.
            at: pages before them that are there; the last tokens, which are computed in any case, read compressed ones
                then as well.
        """
        rate, page_s = self._prefill_rate(), self._page_s()
        if rate is None:
            return UNKNOWN_S
        budget_s = pages * PAGE_SIZE / rate - (0.0 if at else self._compressed_s(pages))
        return None if budget_s <= 0 or (ahead + pages) * (page_s or 0.0) > budget_s else budget_s
