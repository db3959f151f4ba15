"""How fast this server computes prompts."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import torch

from sglang_mosaic.page import PAGE_SIZE

WEIGHT = 0.3
"""Of the newest measurement."""


class PrefillRate:
    """Tokens per second of prefill forwards of at least a page, without waiting for the device."""

    def __init__(self) -> None:
        self._rate: float | None = None
        self._under_way: deque[tuple[int, torch.cuda.Event, torch.cuda.Event]] = deque()

    def __call__(self) -> float | None:
        """None: nothing was measured yet."""
        while self._under_way and self._under_way[0][2].query():
            tokens, start, end = self._under_way.popleft()
            self._add(tokens, start.elapsed_time(end) / 1000)
        return self._rate

    def start(self, device: torch.device) -> Any:
        """A prefill begins in the current stream; what to hand to `stop`."""
        if device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def stop(self, started: Any, tokens: int) -> None:
        """It was launched."""
        if tokens < PAGE_SIZE:
            return
        if isinstance(started, float):
            self._add(tokens, time.perf_counter() - started)
        else:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._under_way.append((tokens, started, event))
            self()

    def _add(self, tokens: int, seconds: float) -> None:
        rate = tokens / max(seconds, 1e-6)
        self._rate = rate if self._rate is None else self._rate + WEIGHT * (rate - self._rate)
