"""How long pages take to come back, whenever somebody looks."""

from __future__ import annotations

import statistics
import time
from collections import deque

WINDOW = 64
"""Newest pages that count."""
FRESH_S = 30.0
"""What is older does not count, if there is something newer. If not, the best of it does: what takes long is not done
any more, and would never be measured again."""


class RestoreRate:
    """Of the manager, which gives pages, and the threads of the server that take them, the slower one: they work at the
    same time. Then the scheduler puts pages in their place, which is added: it is what requests wait for. It does that
    in turns, and a turn takes about as long for a few pages, what makes way and what is launched, as for many.
    Of each, the median of the newest: a calibration or a busy system that held up some of them, not all to come, must
    not keep the others from being asked for.

    What is counted is work, by those who do it: neither the turns of a scheduler that looks late for what has arrived,
    nor time in which nobody asked for anything.

    Args:
        turn_pages: that are put in their place at a time, if there are as many.
    """

    def __init__(self, turn_pages: int) -> None:
        self._turn_pages = turn_pages
        self._manager = _Newest()
        self._own = _Newest()
        self._placed = _Newest()
        self._placed_any = False

    def __call__(self, pages: int) -> float | None:
        """Seconds of so many pages; None: none has come yet."""
        bringing = [who() for who in (self._manager, self._own) if who]
        if not bringing:
            return None
        return pages * max(bringing) + self._turns(pages) * (self._placed() if self._placed else 0.0)

    @property
    def page_s(self) -> float | None:
        """Seconds of one of many pages."""
        seconds = self(self._turn_pages)
        return None if seconds is None else seconds / self._turn_pages

    def answered(self, seconds: float) -> None:
        """The manager took so long for a page."""
        self._manager.add(seconds)

    def received(self, seconds: float) -> None:
        """The server took so long to copy and check a page that was there."""
        self._own.add(seconds)

    def placed(self, seconds: float, pages: int) -> None:
        """The scheduler took so long to put some pages into the tree and into their frames.

        The first time does not count: what takes part is loaded then. Nothing would be brought back for it, and so
        nothing be measured again.
        """
        if self._placed_any:
            self._placed.add(seconds / self._turns(pages))
        self._placed_any = True

    def _turns(self, pages: int) -> int:
        return -(-pages // self._turn_pages)


class _Newest:
    """Of some measurements what is usual by now; there is at least one."""

    def __init__(self) -> None:
        self._measured: deque[tuple[float, float]] = deque(maxlen=WINDOW)
        """When, and seconds."""

    def __bool__(self) -> bool:
        return bool(self._measured)

    def __call__(self) -> float:
        oldest = time.monotonic() - FRESH_S
        fresh = [seconds for at, seconds in self._measured if at >= oldest]
        return statistics.median(fresh) if fresh else min(seconds for _, seconds in self._measured)

    def add(self, seconds: float) -> None:
        self._measured.append((time.monotonic(), seconds))
