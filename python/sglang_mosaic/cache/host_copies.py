"""Bytes on their way from the device to the host, on a stream of their own: no forward waits for them."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import numpy as np
import torch

from sglang_mosaic.cache.host_page import HostPage, Label


def pinned_memory(size: int) -> np.ndarray:
    """uint8 [bytes] that a GPU reads and writes by itself."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()


class _Batch(NamedTuple):
    labels: list[Label]
    rows: torch.Tensor
    """uint8 [pages, bytes], in host memory."""
    done: torch.cuda.Event | None


class HostCopies:
    """Copies of rows, in the order in which they were started."""

    def __init__(self) -> None:
        self._batches: deque[_Batch] = deque()
        self._stream: torch.cuda.Stream | None = None

    @property
    def nbytes(self) -> int:
        """Bytes under way."""
        return sum(batch.rows.nbytes for batch in self._batches)

    def start(self, labels: list[Label], rows: torch.Tensor) -> None:
        """Copy rows, as of now in the current stream.

        Args:
            labels: of each page.
            rows: uint8 [pages, bytes]; nobody else writes to them.
        """
        done = None
        if rows.is_cuda:
            if self._stream is None:
                self._stream = torch.cuda.Stream(rows.device)
            self._stream.wait_stream(torch.cuda.current_stream(rows.device))
            with torch.cuda.stream(self._stream):
                host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
                host.copy_(rows, non_blocking=True)
                done = self._stream.record_event()
            rows.record_stream(self._stream)
            rows = host
        self._batches.append(_Batch(labels, rows, done))

    def finished(self) -> list[tuple[bytes, HostPage]]:
        """Keys and pages that have arrived since this was asked last."""
        pages = []
        while self._batches and (self._batches[0].done is None or self._batches[0].done.query()):
            batch = self._batches.popleft()
            rows = batch.rows.numpy()
            pages += [
                (label.key, HostPage(label.epoch, memoryview(row), label.position))
                for label, row in zip(batch.labels, rows, strict=True)
            ]
        return pages
