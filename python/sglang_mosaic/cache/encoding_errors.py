"""Error that pages were encoded with: summed on the device, read without waiting for it."""

from __future__ import annotations

import math
from collections import deque
from typing import NamedTuple

import torch


class _Reading(NamedTuple):
    pages: int
    sums: torch.Tensor
    """float64 [layers], in host memory."""
    done: torch.cuda.Event | None


class EncodingErrors:
    """What was read is as of some batch of pages, with the number of pages up to it; at most a few forwards old.

    Args:
        layers: of the pool.
        device: of the errors.
    """

    def __init__(self, layers: int, device: torch.device) -> None:
        self._sums = torch.zeros(layers, dtype=torch.float64, device=device)
        self._pages = 0
        self._under_way: deque[_Reading] = deque()
        self._read = _Reading(0, torch.zeros(layers, dtype=torch.float64), None)

    def add(self, errors: torch.Tensor) -> None:
        """Errors of a batch of pages, float32 [layers, pages, heads], as `Epoch.encode` gives them."""
        self._sums += errors.double().square().mean(2).sum(1)
        self._pages += errors.shape[1]
        if self._sums.is_cuda:
            sums = torch.empty(self._sums.shape, dtype=self._sums.dtype, pin_memory=True)
            sums.copy_(self._sums, non_blocking=True)
            done = torch.cuda.current_stream(self._sums.device).record_event()
        else:
            sums, done = self._sums.clone(), None
        self._under_way.append(_Reading(self._pages, sums, done))
        self._take()

    def stats(self) -> dict[str, object]:
        """Root mean squares over pages and heads, and what an average over some time can be made of."""
        self._take()
        squares = (self._read.sums / max(self._read.pages, 1)).tolist()
        return {
            "error": math.sqrt(sum(squares) / len(squares)),
            "error_worst_layer": math.sqrt(max(squares)),
            "error_by_layer": [math.sqrt(square) for square in squares],
            "squared_error_pages": self._read.pages,
            "squared_error_sum": float(self._read.sums.mean()),
        }

    def _take(self) -> None:
        while self._under_way and (self._under_way[0].done is None or self._under_way[0].done.query()):
            self._read = self._under_way.popleft()
