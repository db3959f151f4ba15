"""A plugin of SGLang that holds a server up, at random, after each publication and each copy of ours.

A server loads it that finds this folder in PYTHONPATH. Pauses begin when the file that MOSAIC_JITTER names is there,
and end when it is removed; it holds the longest pause in milliseconds. Answers must be the same with and without.
"""

from __future__ import annotations

import functools
import importlib
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FILE = "MOSAIC_JITTER"
SHORT_S = 0.002
POINTS = {
    # What the scheduler decided is noted; what the next forward reads is published, and what it writes.
    "sglang_mosaic.cache.memory:PageMemory": ("allocate", "free", "restore", "begin_forward", "will_write"),
    "sglang_mosaic.pool.page_table:PageTable": ("update",),
    # Copies to the host and back begin, and have arrived.
    "sglang_mosaic.cache.host_traffic:HostTraffic": ("evicted", "copy_out", "bring_back"),
    "sglang_mosaic.cache.host_copies:HostCopies": ("start", "finished"),
    "sglang_mosaic.cache.restores:Restores": ("begin", "take", "cancel", "completed"),
    # Messages and payloads between the server and its manager.
    "sglang_mosaic.manager.slotted_client:SlottedClient": ("put", "fetch", "poll"),
}


def register() -> None:
    """Wrap every point.

    Raises:
        SystemExit: one is not there, or no file is named: a server that only seems to be disturbed proves nothing.
    """
    if FILE not in os.environ:
        raise SystemExit(f"mosaic_jitter: set {FILE} to the file that tells when to pause")
    jitter = Jitter(Path(os.environ[FILE]), random.Random(0))
    for place, names in POINTS.items():
        module, _, owner = place.partition(":")
        cls = getattr(importlib.import_module(module), owner)
        for name in names:
            if not hasattr(cls, name):
                raise SystemExit(f"mosaic_jitter: {place}.{name} is gone: name the point's new place")
            setattr(cls, name, jitter.after(getattr(cls, name)))
    print(f"mosaic_jitter: {sum(map(len, POINTS.values()))} points", file=sys.stderr, flush=True)


class Jitter:
    """Random pauses: none half of the time, one in twenty up to the longest, the others up to two milliseconds."""

    def __init__(self, file: Path, rng: random.Random) -> None:
        self._file = file
        self._rng = rng

    def pause(self) -> None:
        """Sleep, if the file says so now."""
        try:
            longest_s = float(self._file.read_text() or 0) / 1e3
        except FileNotFoundError:
            return
        drawn = self._rng.random()
        if drawn > 0.5:
            time.sleep(self._rng.uniform(0.0, longest_s if drawn > 0.95 else min(SHORT_S, longest_s)))

    def after(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """The method, and a pause."""

        @functools.wraps(method)
        def held_up(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            self.pause()
            return result

        return held_up
