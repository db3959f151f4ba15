"""Round trips through a manager's process, and what each call of the client costs the server that makes it."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from benchmark.common.errors import BenchmarkError
from benchmark.common.stats import percentile
from benchmark.manager.frames import RealFrames
from mosaic_kernels.segment import REVISION
from sglang_mosaic.codec.storage import epoch_to_bytes
from sglang_mosaic.manager.client import Lookup, Status
from sglang_mosaic.manager.keys import namespace, page_keys
from sglang_mosaic.manager.options import ManagerOptions
from sglang_mosaic.manager.zmq_client import ZmqClient
from sglang_mosaic.wire.messages import Meta, RecordKind

WAIT_S = 120.0


class _Timed:
    """A client whose calls are timed."""

    def __init__(self, options: ManagerOptions) -> None:
        self.client = ZmqClient(options)
        self.calls: dict[str, list[float]] = defaultdict(list)

    def call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = getattr(self.client, name)(*args, **kwargs)
        self.calls[name].append(time.perf_counter() - start)
        return result

    def wait(self, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + WAIT_S
        while not done():
            self.client.poll()
            if time.monotonic() > deadline:
                raise BenchmarkError(f"the manager did not do its work in {WAIT_S:g} s; its log says why")
            time.sleep(0.0005)

    def fetch(self, key: bytes, expected: bytes | None) -> float:
        """Seconds from the question to the checked bytes."""
        start = time.perf_counter()
        self.call("fetch", key, timeout_s=10.0)
        while not (found := self.call("poll")):
            time.sleep(0)  # gives the core to the manager, if there is only one
        seconds = time.perf_counter() - start
        if found[0].status is not (Status.MISS if expected is None else Status.OK):
            raise BenchmarkError(f"a fetch ended with {found[0].status.value}")
        if expected and found[0].data != expected:
            raise BenchmarkError("a fetch brought other bytes than were put")
        return seconds


def measure_latency(real: RealFrames, repeats: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]], float]:
    """Rows of round trips, rows of calls, and seconds from the start of a process until it is ready."""
    frames = [frame.tobytes() for frame in real.frames]
    keys = page_keys(namespace("benchmark"), range(64 * len(frames)))
    meta = Meta(RecordKind.PAGE, REVISION, real.epoch.hash)
    options = ManagerOptions(slot_bytes=len(frames[0]))
    trips: dict[str, list[float]] = {}

    start = time.perf_counter()
    timed = _Timed(dataclasses.replace(options, host_raw_bytes=1 << 40))
    try:
        timed.wait(lambda: timed.client.connected)
        ready_s = time.perf_counter() - start
        trips["put until acknowledged"] = []
        for key, frame in zip(keys, frames, strict=True):
            start = time.perf_counter()
            timed.call("put", key, meta, frame)
            while timed.client.lookup(key) is not Lookup.HIT:
                timed.call("poll")
                time.sleep(0)
            trips["put until acknowledged"].append(time.perf_counter() - start)
        trips["fetch of a miss"] = [timed.fetch(b"?" * 16, None) for _ in range(repeats)]
        pages = list(itertools.islice(itertools.cycle(zip(keys, frames, strict=True)), repeats))
        trips["fetch of a page as it came"] = [timed.fetch(key, frame) for key, frame in pages]
        for key in keys:
            timed.call("lookup", key)
    finally:
        timed.client.close()

    packed = _Timed(options)
    try:
        packed.wait(lambda: packed.client.connected)
        packed.client.put_epoch(real.epoch.hash, epoch_to_bytes(real.epoch))
        for key, frame in zip(keys, frames, strict=True):
            packed.wait(lambda key=key, frame=frame: packed.client.put(key, meta, frame))
        packed.wait(lambda: packed.client.stats()["manager"].get("recompressed") == len(frames))
        trips["fetch of a recompressed page"] = [packed.fetch(key, frame) for key, frame in pages]
    finally:
        packed.client.close()
    return (
        [_spread("trip", name, seconds, 1e3) for name, seconds in trips.items()],
        [_spread("call", name, seconds, 1e6) for name, seconds in timed.calls.items()],
        ready_s,
    )


def _spread(kind: str, name: str, seconds: list[float], factor: float) -> dict[str, Any]:
    values = {f"p{q}": percentile(seconds, q) * factor for q in (50, 90, 99)}
    return {kind: name, "count": len(seconds), **values, "max": max(seconds) * factor}
