"""How fast this server computes prompts."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import torch

from sglang_mosaic.page import PAGE_SIZE

KEPT = 0.7
"""What remains of the weight of former forwards when another one is measured."""


class PrefillRate:
    """Tokens per second of prefill forwards of at least a page, without waiting for the device.

    All tokens over all seconds: short forwards, which are slow for their tokens, say little about long ones.
    """

    def __init__(self) -> None:
        self._tokens = self._seconds = 0.0
        self._under_way: deque[tuple[int, torch.cuda.Event, torch.cuda.Event]] = deque()

    def __call__(self) -> float | None:
        """None: nothing was measured yet."""
        while self._under_way and self._under_way[0][2].query():
            tokens, start, end = self._under_way.popleft()
            self._add(tokens, start.elapsed_time(end) / 1000)
        return self._tokens / self._seconds if self._seconds else None

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
        self._tokens = KEPT * self._tokens + tokens
        self._seconds = KEPT * self._seconds + max(seconds, 1e-6)
