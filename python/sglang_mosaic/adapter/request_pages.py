"""The pages of every request, on the host, in the order of its tokens.

SGLang has them on the device alone, and whoever reads them there from its scheduler's stream waits for the prefill that
runs (docs/kernels.md). What is not known here has to be read there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from sglang_mosaic.adapter import compat
from sglang_mosaic.adapter.node_pages import NodePages
from sglang_mosaic.page import PAGE_SIZE, pages_for

_ATTRIBUTE = "mosaic_pages"


class HandedOut(NamedTuple):
    """What an allocation gave to one request of a batch."""

    pages: list[int]
    total: int
    """Pages that the request has then, those of the prefix tree included."""


class RequestPages:
    """Pages of a request that its node of the prefix tree and those above have not.

    Args:
        first: how many these nodes have.
    """

    def __init__(self, first: int) -> None:
        self.first = first
        self.pages: list[int] = []

    @staticmethod
    def of(request: Any) -> RequestPages | None:
        """Those of a request; None: nobody knows them."""
        return getattr(request, _ATTRIBUTE, None)

    @staticmethod
    def forget(request: Any) -> None:
        """The request has given its pages back."""
        setattr(request, _ATTRIBUTE, None)

    def at(self, start: int, tokens: int) -> list[int] | None:
        """Pages of a run of the request's tokens; None: some are not here."""
        begin, end = start // PAGE_SIZE - self.first, pages_for(start + tokens) - self.first
        return self.pages[begin:end] if 0 <= begin <= end <= len(self.pages) else None

    def advance(self, first: int) -> None:
        """The tree has so many now."""
        del self.pages[: first - self.first]
        self.first = first

    def last(self, count: int, node: Any) -> list[int]:
        """The last pages of the request, at most so many.

        Args:
            node: the request's own of the tree; None: there is no tree, and all its pages are here.
        """
        pages = self.pages[-count:] if count else []
        while len(pages) < count and node is not None and node.parent is not None:
            of_node = NodePages.of(node.value) or NodePages(node.value)()
            pages = of_node[len(pages) - count :] + pages
            node = node.parent
        return pages


def note_extend(requests: Sequence[Any], given: Sequence[HandedOut] | None) -> None:
    """A batch was given pages for the next tokens of its prompts."""
    _note(requests, given, begin=True)


def note_decode(requests: Sequence[Any], given: Sequence[HandedOut] | None) -> None:
    """A batch was given pages for a token more each."""
    _note(requests, given, begin=False)


def _note(requests: Sequence[Any], given: Sequence[HandedOut] | None, begin: bool) -> None:
    if given is None or len(given) != len(requests):
        given = [HandedOut([], -1)] * len(requests)
    for request, (pages, total) in zip(requests, given, strict=True):
        protected = compat.protected_tokens(request)
        if protected is None:
            return
        known, first = RequestPages.of(request), protected // PAGE_SIZE
        if begin and (known is None or known.first != first):
            known = RequestPages(first)
        if known is not None:
            known.pages += pages
            if known.first + len(known.pages) != total:
                known = None  # something was allocated that was not told here
        setattr(request, _ATTRIBUTE, known)
