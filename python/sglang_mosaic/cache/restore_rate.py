"""How long a page takes to come back, whenever somebody looks."""

from __future__ import annotations

import statistics
from collections import deque

WINDOW = 64
"""Newest pages that count."""


class RestoreRate:
    """Of the manager, which gives pages, and the threads of the server that take them, the slower one: they work at the
    same time. Then the scheduler puts pages in their place, which is added: it is what requests wait for.
    Of each, the median of the newest: a calibration or a busy system that held up some of them, not all to come, must
    not keep the others from being asked for.

    What is counted is work, by those who do it: neither the turns of a scheduler that looks late for what has arrived,
    nor time in which nobody asked for anything.
    """

    def __init__(self) -> None:
        self._manager: deque[float] = deque(maxlen=WINDOW)
        self._own: deque[float] = deque(maxlen=WINDOW)
        self._placed: deque[float] = deque(maxlen=WINDOW)

    def __call__(self) -> float | None:
        """Seconds a page; None: none has come yet."""
        bringing = max((statistics.median(who) for who in (self._manager, self._own) if who), default=None)
        return None if bringing is None else bringing + (statistics.median(self._placed) if self._placed else 0.0)

    def answered(self, seconds: float) -> None:
        """The manager took so long for a page."""
        self._manager.append(seconds)

    def received(self, seconds: float) -> None:
        """The server took so long to copy and check a page that was there."""
        self._own.append(seconds)

    def placed(self, seconds: float) -> None:
        """The scheduler took so long a page to put some into the tree and into their frames."""
        self._placed.append(seconds)
