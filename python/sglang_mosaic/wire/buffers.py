"""Host memory that is used again.

Memory that the system has just given costs several times what copying into it does: for the 2.3 MB of a page of an 8B
model 1.6 ms instead of .25, on two CPU cores.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import numpy as np

ARENA_BYTES = 1 << 30
"""Prepared at a time: what gives pinned memory rounds it up to a power of two."""

Allocate = Callable[[int], np.ndarray]
"""New memory, uint8 [bytes]."""


def usual_memory(size: int) -> np.ndarray:
    """Memory that the system may move to disk."""
    return np.empty(size, np.uint8)


class Buffers:
    """Buffers of few sizes, each back here once nobody refers to it any more.

    Args:
        most_bytes: kept for later.
        allocate: gives memory where none is kept.
    """

    def __init__(self, most_bytes: int, allocate: Allocate = usual_memory) -> None:
        self._most_bytes = most_bytes
        self._allocate = allocate
        self._free: dict[int, list[np.ndarray]] = {}
        self._free_bytes = 0

    def prepare(self, size: int) -> None:
        """Have as many buffers of a size as may be kept, from the start: large pieces of memory, cut up."""
        at_once = max(ARENA_BYTES // size, 1)
        for count in range((self._most_bytes - self._free_bytes) // size, 0, -at_once):
            for buffer in self._allocate(min(count, at_once) * size).reshape(-1, size):
                self._give_back(buffer)

    @property
    def free_bytes(self) -> int:
        """Bytes kept for later."""
        return self._free_bytes

    def take(self, size: int) -> memoryview:
        """Writable bytes; what they hold is arbitrary."""
        free = self._free.get(size)
        if free:
            buffer = free.pop()
            self._free_bytes -= size
        else:
            buffer = self._allocate(size)
        # A memoryview holds on to the array that it is of, and not to what that one is of.
        view = buffer[:]
        weakref.finalize(view, self._give_back, buffer).atexit = False
        return view.data

    def _give_back(self, buffer: np.ndarray) -> None:
        if self._free_bytes + buffer.nbytes <= self._most_bytes:
            self._free.setdefault(buffer.nbytes, []).append(buffer)
            self._free_bytes += buffer.nbytes
