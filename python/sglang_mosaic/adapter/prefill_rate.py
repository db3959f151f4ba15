"""How fast this server computes prompts."""

from __future__ import annotations

import math
import time
from collections import deque
from typing import Any

import torch

from sglang_mosaic.page import PAGE_SIZE

KEPT = 0.7
"""What remains of the weight of former forwards when another one is measured."""


class PrefillRate:
    """Tokens per second of prefill forwards of at least a page, without waiting for the device.

    All tokens over all seconds: short forwards, which are slow for their tokens, say little about long ones. They say
    what a forward takes however few its tokens are, which is more where it reads compressed pages.
    """

    def __init__(self) -> None:
        self._tokens = self._seconds = 0.0
        self._least = {False: math.inf, True: math.inf}
        """Seconds of the shortest forward that did not, and that did, read compressed pages."""
        self._under_way: deque[tuple[int, bool, torch.cuda.Event, torch.cuda.Event]] = deque()

    def __call__(self) -> float | None:
        """None: nothing was measured yet."""
        self._look()
        return self._tokens / self._seconds if self._seconds else None

    def compressed_s(self) -> float:
        """Seconds more that a forward takes as it reads compressed pages, however few; 0 while that is not known."""
        self._look()
        more = self._least[True] - self._least[False]
        return max(more, 0.0) if math.isfinite(more) else 0.0

    def start(self, device: torch.device) -> Any:
        """A prefill begins in the current stream; what to hand to `stop`."""
        if device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def stop(self, started: Any, tokens: int, compressed: bool) -> None:
        """It was launched; whether it reads compressed pages."""
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

    def _add(self, tokens: int, compressed: bool, seconds: float) -> None:
        self._least[compressed] = min(self._least[compressed], seconds)
        if tokens >= PAGE_SIZE:
            self._tokens = KEPT * self._tokens + tokens
            self._seconds = KEPT * self._seconds + max(seconds, 1e-6)
