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
    sinks: list[int]
    """First page of a sequence: its attention sinks are outliers, and every later token reads them."""


def choose_victims(sealed: Iterable[int], sinks: Collection[int], recent: Collection[int], limit: int) -> Victims:
    """Sort the oldest sealed pages into ``Victims`` until ``limit`` pages are found.

    Args:
        sealed: sealed pages, oldest first.
        sinks: pages that hold the first tokens of a sequence.
        recent: pages in the recent window of a running request.
        limit: pages wanted.
    """
    cold: list[int] = []
    late: list[int] = []
    last: list[int] = []
    for page in sealed:
        if len(cold) == limit:
            break
        (last if page in sinks else late if page in recent else cold).append(page)
    late = late[: limit - len(cold)]
    return Victims(cold, late, last[: limit - len(cold) - len(late)])
