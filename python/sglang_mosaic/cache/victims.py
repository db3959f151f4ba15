"""Which sealed pages are encoded first."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable


@dataclasses.dataclass(frozen=True)
class Victims:
    """Candidates in order of preference, together at most as many as were asked for."""

    cold: list[int]
    """Oldest seal first."""
    recent: list[int]
    """In the recent window of a running request: instructions and the last turn suffer first."""
    costly: list[int]
    """Would make a larger error than --mosaic-max-error allows."""
    sinks: list[int]
    """First page of a sequence: its attention sinks are outliers, and every later token reads them."""


def choose_victims(
    sealed: Iterable[int], sinks: Collection[int], costly: Collection[int], recent: Collection[int], limit: int
) -> Victims:
    """Sort the oldest sealed pages into ``Victims`` until ``limit`` pages are found.

    Args:
        sealed: sealed pages, oldest first.
        sinks: pages that hold the first tokens of a sequence.
        costly: pages that exceed the error limit.
        recent: pages in the recent window of a running request.
        limit: pages wanted.
    """
    kinds: tuple[list[int], ...] = ([], [], [], [])
    for page in sealed:
        if len(kinds[0]) == limit:
            break
        kinds[3 if page in sinks else 2 if page in costly else 1 if page in recent else 0].append(page)
    left = limit
    for kind in kinds:
        del kind[left:]
        left -= len(kind)
    return Victims(*kinds)
