"""Bytes on their way from the device to the host, on a stream of their own: no forward waits for them."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import numpy as np
import torch

from sglang_mosaic.cache.dense_bytes import host_bytes
from sglang_mosaic.cache.host_page import HostPage, Label
from sglang_mosaic.wire.buffers import Buffers


def pinned_memory(size: int) -> np.ndarray:
    """uint8 [bytes] that a GPU reads and writes by itself."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()


class _Batch(NamedTuple):
    labels: list[Label]
    pages: list[memoryview]
    """Of host memory."""
    done: torch.cuda.Event | None


class HostCopies:
    """Copies of rows, in the order in which they were started.

    Args:
        buffers: give the host's memory; what a GPU copies to while it computes is pinned.
    """

    def __init__(self, buffers: Buffers) -> None:
        self._buffers = buffers
        self._batches: deque[_Batch] = deque()
        self._stream: torch.cuda.Stream | None = None
        self.nbytes = 0
        """Under way. Every request that waits for pages asks, once a turn of the scheduler."""

    def start(self, labels: list[Label], rows: torch.Tensor) -> None:
        """Copy rows, as of now in the current stream.

        Args:
            labels: of each page.
            rows: uint8 [pages, bytes]; nobody else writes to them.
        """
        pages = [self._buffers.take(rows.shape[1]) for _ in labels]
        done = None
        if rows.is_cuda:
            if self._stream is None:
                self._stream = torch.cuda.Stream(rows.device)
            self._stream.wait_stream(torch.cuda.current_stream(rows.device))
            with torch.cuda.stream(self._stream):
                _copy(rows, pages)
                done = self._stream.record_event()
            rows.record_stream(self._stream)
        else:
            _copy(rows, pages)
        self._batches.append(_Batch(labels, pages, done))
        self.nbytes += sum(page.nbytes for page in pages)

    def finished(self) -> list[tuple[bytes, HostPage]]:
        """Keys and pages that have arrived since this was asked last."""
        pages = []
        while self._batches and (self._batches[0].done is None or self._batches[0].done.query()):
            batch = self._batches.popleft()
            self.nbytes -= sum(page.nbytes for page in batch.pages)
            pages += [
                (label.key, HostPage(label.epoch, page, label.position))
                for label, page in zip(batch.labels, batch.pages, strict=True)
            ]
        return pages


def _copy(rows: torch.Tensor, pages: list[memoryview]) -> None:
    for row, page in zip(rows, pages, strict=True):
        host_bytes(page).copy_(row, non_blocking=True)
