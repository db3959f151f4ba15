"""Invariants of the pool, checked as a whole. Cheap enough for every idle moment, too slow for every step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch

from sglang_mosaic.cache.epochs import EpochTable
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


def audit_table(pages: PageLifecycle, table: Sequence[int]) -> None:
    """Addressing: the device finds every page where the host has it, but for what the next forward will change.

    Args:
        pages: the host's view.
        table: frame of each logical page, page 0 included, as the device has it.

    Raises:
        InvariantError: attention would read another page.
    """
    pending = pages.pending_pages
    for page, (found, expected) in enumerate(zip(table, pages.frame, strict=True)):
        if page and page not in pending and found != expected:
            raise InvariantError(f"the page table has page {page} at frame {found} instead of {expected}")


def audit_epochs(pages: PageLifecycle, epochs: EpochTable, first_mosaic: int) -> None:
    """Reading: the calibration of every compressed page is alive.

    Raises:
        InvariantError: nobody could decode the page.
    """
    pending = pages.pending_pages
    compressed = [
        (page, frame) for page, frame in enumerate(pages.frame) if frame >= first_mosaic and page not in pending
    ]
    numbers = epochs.numbers_of(torch.tensor([frame for _, frame in compressed], dtype=torch.int64)).tolist()
    for (page, frame), number in zip(compressed, numbers, strict=True):
        if number not in epochs.numbers:
            raise InvariantError(f"page {page} in frame {frame} is of calibration {number}, which is gone")
