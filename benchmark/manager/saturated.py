"""A manager that always has pages to compress, beside whatever is measured."""

from __future__ import annotations

import functools
import itertools
import threading
import time

import torch

from benchmark.common.errors import BenchmarkError
from mosaic_kernels.segment import REVISION
from sglang_mosaic.codec import LayerSample, PlanesCodec, PlanesEpoch
from sglang_mosaic.codec.storage import epoch_to_bytes
from sglang_mosaic.manager.keys import namespace, page_keys
from sglang_mosaic.manager.options import ManagerOptions
from sglang_mosaic.manager.zmq_client import ZmqClient
from sglang_mosaic.wire.messages import Meta, RecordKind

LAYERS, HEADS, DIM, PAGES = 8, 3, 64, 8
BACKLOG = 16
"""Pages that wait at least."""
TURN_S = 0.02


@functools.cache
def _random_pages() -> tuple[PlanesEpoch, list[bytes]]:
    """An epoch and frames of it. Calibrating takes most of a benchmark's start."""
    torch.manual_seed(0)
    energy = torch.logspace(0.5, -1.5, DIM)
    kv = [[torch.randn(PAGES, 64, HEADS, DIM) * energy for _ in range(2)] for _ in range(LAYERS)]
    codec = PlanesCodec(LAYERS, HEADS, DIM, DIM)
    for layer in range(LAYERS):
        codec.observe_queries(layer, torch.randn(64, 3 * HEADS, DIM))
    epoch = codec.calibrate([LayerSample(k, v) for k, v in kv])
    data = torch.cat([epoch.encode(layer, k, v)[0] for layer, (k, v) in enumerate(kv)], 1).numpy()
    return epoch, [row.tobytes() for row in data]


class SaturatedManager:
    """Its process gets random pages to make coarser whenever `busy` is set, more than it can; nothing otherwise.

    Args:
        nice: added to its nice level.
    """

    def __init__(self, nice: int) -> None:
        epoch, self._frames = _random_pages()
        self._meta = Meta(RecordKind.PAGE, REVISION, epoch.hash)
        options = ManagerOptions(
            len(self._frames[0]), slots=32, host_bytes=1 << 27, host_max_error=0.5, nice=nice, heartbeat_s=0.1
        )
        self._client = ZmqClient(options)
        self._client.put_epoch(epoch.hash, epoch_to_bytes(epoch))
        self.busy = threading.Event()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> SaturatedManager:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()
        self._client.close()

    @property
    def compressed(self) -> int:
        """Pages since it started, as of its last heartbeat."""
        return self._metric("recompressed")

    @property
    def backlog(self) -> int:
        """Pages that wait, as of its last heartbeat."""
        return self._metric("backlog")

    def settle(self, busy: bool, patience_s: float = 60.0) -> None:
        """Wait until it has a queue, or none.

        Raises:
            BenchmarkError: it does not get there.
        """
        (self.busy.set if busy else self.busy.clear)()
        deadline = time.monotonic() + patience_s
        while (self.backlog < BACKLOG // 2) if busy else self.backlog:
            if time.monotonic() > deadline:
                raise BenchmarkError(f"the manager has a queue of {self.backlog} pages after {patience_s:g} s")
            time.sleep(TURN_S)

    def _metric(self, name: str) -> int:
        return self._client.stats()["manager"].get(name, 0)

    def _run(self) -> None:
        keys = (page_keys(namespace(str(i)), range(64))[0] for i in itertools.count())
        frames = itertools.cycle(self._frames)
        while not self._ended.wait(TURN_S):
            self._client.poll()
            for _ in range(8):
                if not self.busy.is_set() or self.backlog >= BACKLOG or not self._client.room:
                    break
                self._client.put(next(keys), self._meta, next(frames))
