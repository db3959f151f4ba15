"""How long a page takes to come back, whenever somebody looks."""

from __future__ import annotations

import statistics
from collections import deque

WINDOW = 64
"""Newest pages that count."""


class RestoreRate:
    """Of the manager, which gives pages, and the server, which takes them, the slower one: they work at the same time.
    For each, the median of the newest pages: a calibration or a busy system that held up some of them, not all to
    come, must not keep the others from being asked for.

    What is counted is work, by those who do it: neither the turns of a scheduler that looks late for what has arrived,
    nor time in which nobody asked for anything.
    """

    def __init__(self) -> None:
        self._manager: deque[float] = deque(maxlen=WINDOW)
        self._own: deque[float] = deque(maxlen=WINDOW)

    def __call__(self) -> float | None:
        """Seconds a page; None: none has come yet."""
        return max((statistics.median(who) for who in (self._manager, self._own) if who), default=None)

    def answered(self, seconds: float) -> None:
        """The manager took so long for a page."""
        self._manager.append(seconds)

    def received(self, seconds: float) -> None:
        """The server took so long to copy and check a page that was there."""
        self._own.append(seconds)
