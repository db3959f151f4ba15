"""What the manager does: requests in, replies out. Knows no socket; the process and the in-process client drive it.

`answer` answers one request: puts, which nobody waits for, in another thread than all else if there is one (one thread
each). `work` is one step of what is done besides, compressing and writing, for a third one. A calibration runs in a
process of its own. So a restore waits for a share of one core at worst, never for an SVD.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import msgspec

from sglang_mosaic.manager.calibrator import Calibrator
from sglang_mosaic.manager.keys import epoch_key, transform_key
from sglang_mosaic.manager.metrics import ManagerMetrics
from sglang_mosaic.manager.options import ManagerOptions
from sglang_mosaic.manager.recompress.cold_pages import ColdPages
from sglang_mosaic.manager.recompress.groups import FrameError
from sglang_mosaic.manager.recompress.recompressor import Recompressor
from sglang_mosaic.manager.recompress.rope import Rope
from sglang_mosaic.manager.store.directory import DirectoryTier
from sglang_mosaic.manager.store.eviction import LeastRecentlyUsed
from sglang_mosaic.manager.store.memory import MemoryTier
from sglang_mosaic.manager.store.record import EPOCH_BYTES, Form, Record
from sglang_mosaic.manager.store.tiers import Change, Store
from sglang_mosaic.wire import messages as wire
from sglang_mosaic.wire.messages import RecordKind, WireError
from sglang_mosaic.wire.slots import BACK_THREADS, OUT_THREADS, SlotMemory, checksum

MOST_RECORD_BYTES = 1 << 30
"""Largest record that is put in parts."""
MOST_UPLOADS = 2
"""Records that may be half here at a time."""


class _Found(NamedTuple):
    """A record that was asked for."""

    request: wire.Fetch
    record: Record
    total: int
    """Bytes of what it restores to."""
    part: memoryview
    """Of these, what goes now."""
    in_memory: bool


class Service:
    """One manager's state.

    Args:
        slots: the owner's shared memory.
        options: limits.
    """

    def __init__(self, slots: SlotMemory, options: ManagerOptions) -> None:
        self.metrics = ManagerMetrics()
        self.leaving = False
        """The owner said goodbye."""
        directory = None if options.disk is None else DirectoryTier(Path(options.disk), options.disk_bytes)
        memory = MemoryTier(options.host_bytes, LeastRecentlyUsed())
        self.store = Store(memory, directory, options.host_raw_bytes)
        self._slots = slots
        rope = Rope(options.rope_frequencies, options.rope_interleaved)
        cold = ColdPages(options.cold_max_error, rope, self._epoch, self._transform)
        self._recompressor = Recompressor(options.host_max_error, self._epoch, cold)
        self._calibrator = Calibrator(options.calibration_threads)
        self._out, self._back = (
            ThreadPoolExecutor(threads) if threads > 1 else None for threads in (OUT_THREADS, BACK_THREADS)
        )
        """Threads that copy from slots and to slots; None: who asks copies."""
        self._uploads: dict[bytes, bytearray] = {}
        self._statistics: dict[bytes, bytes | memoryview] = {}
        self._last_ticket = 0
        self._rescan_s = options.rescan_s
        self._next_scan = time.monotonic() + options.rescan_s

    @property
    def busy(self) -> bool:
        """Whether something may end without a message."""
        return self.store.backlog > 0 or self._calibrator.running

    def hello(self) -> list[wire.Reply]:
        """What a manager says first: all that it has, then that it is ready."""
        return [*_as_messages(Change(record, True) for record in self.store.ids()), wire.Ready(pid=os.getpid())]

    def handle(self, data: bytes) -> list[wire.Reply]:
        """Answer one message; what is none is counted and not answered."""
        request = self.receive(data)
        return [] if request is None else self.answer(request)

    def receive(self, data: bytes) -> wire.Request | None:
        """The request of a message, to be answered; None: it is none, which is counted. In the order of messages."""
        try:
            request = wire.decode_request(data)
            if request.ticket <= self._last_ticket:
                raise WireError(f"ticket {request.ticket} after {self._last_ticket}: a replay")
        except WireError:
            self.metrics.refused_messages += 1
            return None
        self._last_ticket = request.ticket
        return request

    def answer(self, request: wire.Request) -> list[wire.Reply]:
        """What to reply to a request that was received."""
        if isinstance(request, wire.Put):
            return self.store_all([request])
        if isinstance(request, wire.Fetch):
            return self.fetch_all([request])
        if isinstance(request, wire.Calibrate):
            return self._calibrate(request)
        if isinstance(request, wire.Cancel):
            self._calibrator.cancel(request.cancelled)
            return []
        if isinstance(request, wire.Ping):
            return [wire.Pong(ticket=request.ticket, metrics=self._gauged().as_dict())]
        self.leaving = True
        return []

    def store_all(self, requests: list[wire.Put]) -> list[wire.Reply]:
        """What to reply to puts, in their order. Several threads copy, if there are so many cores."""
        pool = self._out if len(requests) > 1 else None
        payloads = map(self._read, requests) if pool is None else pool.map(self._read, requests)
        return [self._put(request, data) for request, data in zip(requests, payloads, strict=True)]

    def fetch_all(self, requests: list[wire.Fetch]) -> list[wire.Reply]:
        """The same of fetches."""
        start = time.monotonic()
        found = [self._find(request, start) for request in requests]
        pool = self._back if len(requests) > 1 else None
        written = map(self._write, found) if pool is None else pool.map(self._write, found)
        replies: list[wire.Reply] = []
        for request, one, done in zip(requests, found, written, strict=True):
            reply = wire.Fetched(ticket=request.ticket, slot=request.slot, key=request.key)
            if one is not None and done is None:
                self.metrics.refused_messages += 1
            elif one is not None and done is not None:
                payload, answered = done
                self.metrics.hits_memory += one.in_memory
                self.metrics.hits_disk += not one.in_memory
                self.metrics.restore.add(answered - start)
                reply = msgspec.structs.replace(
                    reply, meta=one.record.meta, payload=payload, total=one.total, answered=answered
                )
            replies.append(reply)
        return replies

    def collect(self) -> list[wire.Reply]:
        """What happened besides: calibrations that are done, records that came or went."""
        done: list[wire.Reply] = []
        for ticket, hash_, epoch in self._calibrator.poll():
            key = epoch_key(hash_)
            if epoch is not None and self._keep(key, wire.Meta(RecordKind.EPOCH), epoch):
                self.metrics.calibrations += 1
                done.append(wire.Calibrated(ticket=ticket, key=key))
            else:
                self.metrics.calibrations_failed += 1
                done.append(wire.Calibrated(ticket=ticket, error="the calibration failed; the manager's log says why"))
        # Before the answers that speak of them.
        return [*_as_messages(self.store.take_changes()), *done]

    def work(self, flush: bool = False) -> bool:
        """Compress and write one record, or look at the directory; False: nothing was to be done.

        Args:
            flush: what may wait is due, too; what can be done without is left.
        """
        if time.monotonic() > self._next_scan:
            self.store.rescan()
            self._next_scan = time.monotonic() + self._rescan_s
        record = self.store.next(flush)
        if record is None:
            return not flush and self._work_on_cold()
        try:
            if not self._recompressor.ready(record):
                self.store.park(record)
                return True
            smaller = self._recompressor.compress(record)
            transform = self._recompressor.cold.learn(record)
        except FrameError:
            # It would never be read as a frame.
            self.metrics.refused_records += 1
            self.store.remove(record.id)
            return True
        if smaller is not None:
            self.metrics.recompressed += 1
            self.metrics.recompressed_from += len(record.body)
            self.metrics.recompressed_to += len(smaller.body)
        self.store.settle(record, smaller or record)
        if transform is not None:
            self._keep(transform_key(record.meta.epoch), wire.Meta(RecordKind.TRANSFORM), transform)
        return True

    def close(self) -> None:
        """End what still runs."""
        self._calibrator.close()
        for pool in filter(None, (self._out, self._back)):
            pool.shutdown()

    def _work_on_cold(self) -> bool:
        """Transform-code one page that is about to leave memory; False: there is none, or room enough."""
        cold = self._recompressor.cold
        # Looking for one goes through the records, for nothing in most servers.
        record = self.store.coldest(cold.can_code) if cold.codes else None
        if record is None:
            return False
        try:
            smaller = cold.compress(record, self._recompressor.restore(record))
        except FrameError:
            # As it is it can be read; it only has something that the transform cannot say.
            smaller = None
        self.store.settle_cold(record, smaller)
        if smaller is not None:
            self.metrics.transformed += 1
            self.metrics.transformed_from += len(record.body)
            self.metrics.transformed_to += len(smaller.body)
        return True

    def _read(self, request: wire.Put) -> memoryview | None:
        """The bytes of a put; None: they are not what was meant."""
        try:
            return self._slots.read(request.payload, request.key)
        except WireError:
            return None

    def _put(self, request: wire.Put, data: memoryview | None) -> wire.Stored:
        accepted = False
        try:
            if data is None:
                raise WireError("no payload")
            accepted = self._receive(request, data)
        except WireError:
            self.metrics.refused_payloads += 1
            self._uploads.pop(request.key, None)
        return wire.Stored(ticket=request.ticket, slot=request.payload.slot, accepted=accepted)

    def _receive(self, request: wire.Put, data: bytes | memoryview) -> bool:
        """A whole record, or the next part of one."""
        meta = request.meta
        if meta.kind is not RecordKind.PAGE:
            data = bytes(data)  # which is read in many ways
        if meta.kind is RecordKind.TRANSFORM or not -1 <= meta.position < 1 << 32:
            raise WireError(f"a record of kind {meta.kind} at {meta.position}")
        if len(meta.epoch) > EPOCH_BYTES or not meta.epoch.isascii() or not 0 <= meta.revision < 1 << 32:
            raise WireError(f"revision {meta.revision} of epoch {meta.epoch[:EPOCH_BYTES]!r}")
        total = request.total
        if request.offset < 0 or not data or not request.offset + len(data) <= total <= MOST_RECORD_BYTES:
            raise WireError(f"bytes {request.offset} to {request.offset + len(data)} of {total}")
        known: int | None = request.payload.checksum
        if len(data) < total:
            known = None
            if request.offset == 0:
                while len(self._uploads) >= MOST_UPLOADS:
                    self._uploads.pop(next(iter(self._uploads)))
                self._uploads[request.key] = bytearray()
            parts = self._uploads.get(request.key)
            if parts is None or len(parts) != request.offset:
                raise WireError(f"a part of a record at {request.offset} that does not follow the one before")
            parts += data
            if len(parts) < total:
                return True
            data = bytes(self._uploads.pop(request.key))
        if request.meta.kind is RecordKind.STATISTICS:
            self._statistics = {request.key: data}  # one calibration at a time
            return True
        return self._keep(request.key, request.meta, data, known)

    def _keep(self, key: bytes, meta: wire.Meta, data: bytes | memoryview, known: int | None = None) -> bool:
        """Store a record, whose checksum may be known; False: it is larger than the store."""
        digest = checksum(key, data) if known is None else known
        if not self.store.put(Record(key, meta, Form.RAW, len(data), digest, data)):
            self.metrics.refused_full += 1
            return False
        self.metrics.stored += 1
        return True

    def _find(self, request: wire.Fetch, now: float) -> _Found | None:
        """What was asked for; None, and counted: a miss."""
        self.metrics.fetches += 1
        if now > request.deadline:
            self.metrics.expired += 1
            return None
        record_id = request.kind, request.key
        in_memory = record_id in self.store.memory
        record = self.store.get(record_id)
        if record is None:
            self.metrics.misses += 1
            return None
        try:
            # What goes whole and as it is, the server checks against the same checksum.
            as_it_is = record.form is Form.RAW and record.length == len(record.body) <= self._slots.slot_bytes
            data = record.body if as_it_is else self._recompressor.restore(record)
        except FrameError:
            self.metrics.refused_records += 1
            self.metrics.misses += 1
            self.store.remove(record_id)
            return None
        part = memoryview(data)[request.offset : request.offset + self._slots.slot_bytes]
        if request.offset < 0 or not part:
            self.metrics.refused_messages += 1
            return None
        return _Found(request, record, len(data), part, in_memory)

    def _write(self, found: _Found | None) -> tuple[wire.Payload, float] | None:
        """Copy what was found into its slot, and when that was done; None: there is nothing, or no such slot."""
        if found is None:
            return None
        known = found.record.checksum if len(found.part) == found.record.length else None
        try:
            payload = self._slots.write(found.request.slot, found.request.key, found.part, known)
        except WireError:
            return None
        return payload, time.monotonic()

    def _calibrate(self, request: wire.Calibrate) -> list[wire.Reply]:
        statistics = self._statistics.pop(request.key, None)
        if statistics is None:
            return [wire.Calibrated(ticket=request.ticket, error="the statistics are not here")]
        if not self._calibrator.start(request.ticket, lambda file: file.write(statistics)):
            return [wire.Calibrated(ticket=request.ticket, error="another calibration is running")]
        return []

    def _epoch(self, hash_: str) -> bytes | None:
        record = self.store.get((RecordKind.EPOCH, epoch_key(hash_)))
        return None if record is None else bytes(record.body)

    def _transform(self, hash_: str) -> bytes | None:
        record = self.store.get((RecordKind.TRANSFORM, transform_key(hash_)))
        return None if record is None else bytes(record.body)

    def _gauged(self) -> ManagerMetrics:
        metrics, memory, directory = self.metrics, self.store.memory, self.store.directory
        metrics.memory_records, metrics.memory_bytes = len(memory), memory.nbytes
        metrics.memory_restored_bytes = memory.restored_bytes
        if directory is not None:
            metrics.disk_records, metrics.disk_bytes = len(directory), directory.nbytes
            metrics.refused_writes = directory.failed_writes
        metrics.backlog = self.store.backlog
        metrics.evicted = self.store.evicted
        return metrics


def _as_messages(changes: Iterable[Change]) -> list[wire.Reply]:
    """As few messages as keep the order."""
    messages: list[wire.Reply] = []
    run: list[bytes] = []
    last: tuple[RecordKind, bool] | None = None

    def end() -> None:
        if run and last is not None:
            kind, known = last
            messages.append((wire.Known if known else wire.Gone)(kind=kind, keys=b"".join(run)))
            run.clear()

    for (kind, key), known in changes:
        if kind is RecordKind.TRANSFORM:  # the manager's own
            continue
        if (kind, known) != last or len(run) == wire.KEYS_PER_MESSAGE:
            end()
            last = kind, known
        run.append(key)
    end()
    return messages
