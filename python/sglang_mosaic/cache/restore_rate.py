"""How long a page takes to come back, whenever somebody looks."""

from __future__ import annotations

from collections import deque

WINDOW = 64
"""Newest pages that count."""
OUTLIERS = 8
"""One in so many of them does not, the slowest: a calibration or a busy system held up one page, not all to come."""


class RestoreRate:
    """Mean over the newest pages. What is counted is work, by those who do it: neither the turns of a scheduler that
    looks late for what has arrived, nor time in which nobody asked for anything."""

    def __init__(self) -> None:
        self._manager: deque[float] = deque(maxlen=WINDOW)
        self._own: deque[float] = deque(maxlen=WINDOW)

    def __call__(self) -> float | None:
        """Seconds a page; None: none has come yet."""
        if not self._manager:
            return None
        return _mean(self._manager) + (_mean(self._own) if self._own else 0.0)

    def answered(self, seconds: float) -> None:
        """The manager took so long for a page."""
        self._manager.append(seconds)

    def received(self, pages: int, seconds: float) -> None:
        """The server took so long to copy and check pages that were there."""
        self._own.extend([seconds / pages] * pages)


def _mean(seconds: deque[float]) -> float:
    usual = sorted(seconds)[: len(seconds) - len(seconds) // OUTLIERS]
    return sum(usual) / len(usual)
