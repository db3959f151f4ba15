"""How long this server takes for a prefill."""

from __future__ import annotations

import time
from collections import deque
from typing import Any, NamedTuple

import torch

from sglang_mosaic.page import PAGE_SIZE

WINDOW = 64
"""Newest forwards that count, of those that read compressed pages and of the others."""
FEWEST = 3
"""Forwards that tell the least that others take: in the first ones kernels are compiled."""


class _Forward(NamedTuple):
    tokens: int
    compressed: int
    """Pages that it read."""
    seconds: float


class PrefillTime:
    """Seconds of a prefill, from those of former ones, without waiting for the device.

    A long one takes as long as its tokens, a short one as long as launching its kernels, of which there are more where
    compressed pages are read. So the estimate is the larger of the two: tokens by the usual time of a token, and the
    least of forwards that did no more of either. That is a lower bound where few are known.
    """

    def __init__(self) -> None:
        self._plain: deque[_Forward] = deque(maxlen=WINDOW)
        self._compressed: deque[_Forward] = deque(maxlen=WINDOW)
        self._under_way: deque[tuple[int, int, torch.cuda.Event, torch.cuda.Event]] = deque()

    def __call__(self, tokens: int, compressed: int) -> float | None:
        """
        Args:
            tokens: to compute.
            compressed: pages that they read.

        Returns:
            Seconds. None: nothing was measured yet.
        """
        self._look()
        token_s = self._token_s()
        if token_s is None:
            return None
        least_s = 0.0
        for alike in (self._plain, self._compressed) if compressed else (self._plain,):
            no_more = [one.seconds for one in alike if one.tokens <= tokens and one.compressed <= compressed]
            if len(no_more) >= FEWEST:
                least_s = max(least_s, min(no_more))
        return max(tokens * token_s, least_s)

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
        (self._compressed if compressed else self._plain).append(_Forward(tokens, compressed, seconds))

    def _token_s(self) -> float | None:
        """That of most tokens: their median, so that neither short forwards nor one that was held up says much."""
        long = [one for one in (*self._plain, *self._compressed) if one.tokens >= PAGE_SIZE]
        left = sum(one.tokens for one in long) / 2
        for one in sorted(long, key=lambda one: one.seconds / one.tokens):
            left -= one.tokens
            if left <= 0:
                return one.seconds / one.tokens
        return None
