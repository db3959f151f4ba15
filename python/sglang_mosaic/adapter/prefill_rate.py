"""How fast this server computes prompts."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import torch

from sglang_mosaic.page import PAGE_SIZE

KEPT = 0.7
"""What remains of the weight of former forwards when another one is measured."""
WINDOW = 64
"""Newest forwards whose own time is known."""
FEWEST = 3
"""Forwards that tell what reading compressed pages adds: in the first ones kernels are compiled."""


class PrefillRate:
    """Tokens per second of prefill forwards of at least a page, without waiting for the device.

    All tokens over all seconds: short forwards, which are slow for their tokens, say little about long ones. What a
    forward takes beyond its tokens is known by itself: it is more where compressed pages are read.
    """

    def __init__(self) -> None:
        self._tokens = self._seconds = 0.0
        self._plain: deque[float] = deque(maxlen=WINDOW)
        """Seconds beyond those of its tokens, of forwards without a compressed page."""
        self._compressed: deque[tuple[int, float]] = deque(maxlen=WINDOW)
        """Of others, how many they read, and the same."""
        self._under_way: deque[tuple[int, int, torch.cuda.Event, torch.cuda.Event]] = deque()

    def __call__(self) -> float | None:
        """None: nothing was measured yet."""
        self._look()
        return self._tokens / self._seconds if self._seconds else None

    def compressed_s(self, pages: int) -> float:
        """Seconds more that a forward takes as it reads so many compressed pages; 0 while that is not known.

        The least of forwards that read no more: a lower bound, so that a doubt speaks for restoring, and is resolved.
        """
        self._look()
        found = [seconds for read, seconds in self._compressed if read <= pages]
        return max(min(found) - min(self._plain), 0.0) if len(found) >= FEWEST and self._plain else 0.0

    def start(self, device: torch.device) -> Any:
        """A prefill begins in the current stream; what to hand to `stop`."""
        if device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def stop(self, started: Any, tokens: int, compressed: int) -> None:
        """It was launched; how many compressed pages it reads."""
        if isinstance(started, float):
            self._add(tokens, compressed, time.perf_counter() - started)
        else:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._under_way.append((tokens, compressed, started, event))
            self._look()

    def _look(self) -> None:
        while self._under_way and self._under_way[0][-1].query():
            tokens, compressed, start, end = self._under_way.popleft()
            self._add(tokens, compressed, start.elapsed_time(end) / 1000)

    def _add(self, tokens: int, compressed: int, seconds: float) -> None:
        if tokens >= PAGE_SIZE:
            self._tokens = KEPT * self._tokens + tokens
            self._seconds = KEPT * self._seconds + max(seconds, 1e-6)
        if not self._seconds:
            return
        beyond = max(seconds - tokens * self._seconds / self._tokens, 0.0)
        if compressed:
            self._compressed.append((compressed, beyond))
        else:
            self._plain.append(beyond)
