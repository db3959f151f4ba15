"""Invariants of the pool, checked as a whole. Cheap enough for every idle moment, too slow for every step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from sglang_mosaic.cache.lifecycle import PageLifecycle
from sglang_mosaic.errors import InvariantError
from sglang_mosaic.page import UNMAPPED, PageState

_DENSE = (PageState.OPEN, PageState.SEALED)


def audit_frames(pages: PageLifecycle) -> None:
    """Physical conservation: every live page has exactly one frame of the right kind, every frame at most one page.

    Raises:
        InvariantError: names the first violation.
    """
    owners: Counter[int] = Counter(pages.dense.snapshot() + pages.mosaic.snapshot())
    for page, (state, frame) in enumerate(zip(pages.state, pages.frame, strict=True)):
        if page == 0:
            continue
        if (state is PageState.FREE) != (frame == UNMAPPED):
            raise InvariantError(f"page {page} is {state.name} with frame {frame}")
        if state is PageState.FREE:
            continue
        if (state in _DENSE) != (frame <= pages.plan.dense_frames):
            raise InvariantError(f"page {page} is {state.name} but has frame {frame} of the other kind")
        owners[frame] += 1
    expected = range(1, pages.plan.logical_pages + 1)
    for frame in expected:
        if owners[frame] != 1:
            raise InvariantError(f"frame {frame} has {owners[frame]} owners (page or free list) instead of one")
    if len(owners) != len(expected):
        raise InvariantError(f"frames outside 1..{len(expected)} are in use: {sorted(set(owners) - set(expected))[:8]}")
    wrong = [page for page in pages.sealed if pages.state[page] is not PageState.SEALED]
    if wrong:
        raise InvariantError(f"pages {wrong[:8]} are queued for encoding without being sealed")


def audit_free_list(pages: PageLifecycle, free_pages: Iterable[int]) -> None:
    """Logical conservation: exactly the pages of SGLang's free list are FREE here.

    Raises:
        InvariantError: a page is lost or counted twice.
    """
    counted = Counter(free_pages)
    twice = [page for page, count in counted.items() if count > 1]
    if twice:
        raise InvariantError(f"pages {twice[:8]} are in the free list twice")
    for page, state in enumerate(pages.state):
        if page and (state is PageState.FREE) != (page in counted):
            raise InvariantError(
                f"page {page} is {state.name}, but {'' if page in counted else 'not '}in the free list"
            )


def audit_tree(pages: PageLifecycle, tree_pages: Iterable[int]) -> None:
    """Sharing: the prefix tree holds each page once, and only full pages with a frame.

    Raises:
        InvariantError: a later prefix hit would read garbage.
    """
    counted = Counter(tree_pages)
    for page, count in counted.items():
        if count > 1:
            raise InvariantError(f"page {page} hangs on {count} tree positions")
        if pages.state[page] in (PageState.FREE, PageState.OPEN):
            raise InvariantError(f"the prefix tree holds page {page}, which is {pages.state[page].name}")
