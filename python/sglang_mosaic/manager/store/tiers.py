"""The store: host memory, behind it an optional directory, and what waits to be compressed and written."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from sglang_mosaic.manager.keys import epoch_key, transform_key
from sglang_mosaic.manager.store.directory import DirectoryTier
from sglang_mosaic.manager.store.memory import MemoryTier
from sglang_mosaic.manager.store.record import Form, Record, RecordId
from sglang_mosaic.wire.messages import RecordKind

SHORT = 0.75
"""Share of the memory tier in use from which cold pages are made smaller still."""


class Change(NamedTuple):
    """A record that can be had from now on, or not any more."""

    record: RecordId
    known: bool


class Store:
    """Records by id. New ones go to memory; a background thread takes them from the backlog, compresses them, gives
    them back by `settle`, and so writes them to the directory.

    An epoch and its transform count as used whenever one of its pages is, just after it: they go after the last of
    them. Safe to use from two threads.

    Args:
        memory: first tier.
        directory: second tier, or None.
        raw_bytes: bytes of the backlog that may wait, newest last.
    """

    def __init__(self, memory: MemoryTier, directory: DirectoryTier | None = None, raw_bytes: int = 0) -> None:
        self.memory = memory
        self.directory = directory
        self.evicted = 0
        self._raw_bytes = raw_bytes
        self._lock = threading.RLock()
        self._backlog: dict[RecordId, int] = {}
        """Oldest first, with their bytes."""
        self._parked: dict[str, list[Record]] = {}
        """Pages that came before their epoch, by its hash."""
        self._waiting = 0
        self._left: set[RecordId] = set()
        """Cold pages that do not become smaller."""
        self._changes: deque[Change] = deque()

    @property
    def backlog(self) -> int:
        """Records that were not settled yet."""
        return len(self._backlog)

    def ids(self) -> list[RecordId]:
        """All records that can be had."""
        with self._lock:
            ids = dict.fromkeys(self.memory.ids())
            if self.directory is not None:
                ids |= dict.fromkeys(self.directory.ids())
            return list(ids)

    def put(self, record: Record) -> bool:
        """Keep a new record in memory; False: it is larger than all of it."""
        with self._lock:
            if not self._remember(record):
                return False
            self._add_backlog(record)
            self._use_epoch(record)
            for hash_ in [hash_ for hash_ in self._parked if (RecordKind.EPOCH, epoch_key(hash_)) == record.id]:
                for page in self._parked.pop(hash_):
                    if self.memory.peek(page.id) is page:
                        self._add_backlog(page)
        return True

    def get(self, record: RecordId) -> Record | None:
        """A record from the first tier that has it; None: a miss."""
        with self._lock:
            found = self.memory.get(record)
            if found is not None:
                self._use_epoch(found)
                return found
        if self.directory is None or record not in self.directory:
            return None
        found = self.directory.read(record)
        with self._lock:
            if found is None:
                self._changes.append(Change(record, False))
            else:
                self._remember(found)
                self._use_epoch(found)
        return found

    def remove(self, record: RecordId) -> None:
        """Drop a record that turned out to be damaged from all tiers."""
        with self._lock:
            self.memory.remove(record)
            self._forget_backlog(record)
            if self.directory is not None:
                self.directory.remove(record)
            self._changes.append(Change(record, False))

    def next(self, flush: bool = False) -> Record | None:
        """The oldest record of the backlog, which leaves it; None: nothing is due.

        Args:
            flush: what may wait is due, too.
        """
        with self._lock:
            while self._backlog and (flush or self._waiting > self._raw_bytes):
                record = next(iter(self._backlog))
                self._forget_backlog(record)
                found = self.memory.peek(record)
                if found is not None:
                    return found
        return None

    def park(self, page: Record) -> None:
        """Put a page back into the backlog when its epoch arrives: without it nobody could use it."""
        with self._lock:
            pages = self._parked.setdefault(page.meta.epoch, [])
            pages[:] = [other for other in pages if self.memory.peek(other.id) is other]
            pages.append(page)

    def settle(self, before: Record, after: Record) -> None:
        """What became of a record of the backlog: it takes its place, unless there is another one by now, and goes to
        the directory."""
        with self._lock:
            if after is not before and self.memory.peek(before.id) is before:
                self._remember(after)
        if self.directory is not None and self.directory.write(after):
            for shared in _shared_by(after):
                self.directory.use(shared)
            self._changes.append(Change(after.id, True))

    def coldest(self, wanted: Callable[[Record], bool]) -> Record | None:
        """When memory is short, the packed page that is next to leave it, of those that are wanted; None: not now."""
        with self._lock:
            if self.memory.nbytes <= SHORT * self.memory.limit_bytes:
                return None
            if len(self._left) > len(self.memory):
                self._left.intersection_update(self.memory.ids())
            for record in self.memory.coldest_first():
                if record.form is Form.PACKED and record.id not in self._left and wanted(record):
                    return record
        return None

    def settle_cold(self, before: Record, after: Record | None) -> None:
        """What became of a cold page: it takes its place in all tiers, as old as before; None: nothing."""
        with self._lock:
            if after is None:
                self._left.add(before.id)
                return
            if self.memory.peek(before.id) is not before:
                return
            self.memory.replace(after)
        if self.directory is not None and before.id in self.directory:
            self.directory.write(after, keep_age=True)

    def rescan(self) -> None:
        """Look at what other managers did to the directory."""
        if self.directory is None:
            return
        before = set(self.directory.ids())
        self.directory.scan()
        after = set(self.directory.ids())
        with self._lock:
            self._changes += [Change(record, True) for record in after - before]
            self._changes += [Change(record, False) for record in before - after if record not in self.memory]

    def take_changes(self) -> list[Change]:
        """What changed since the last call, in order."""
        changes = []
        while self._changes:
            changes.append(self._changes.popleft())
        return changes

    def _remember(self, record: Record) -> bool:
        evicted = self.memory.put(record)
        if evicted is None:
            return False
        self._changes.append(Change(record.id, True))
        self.evicted += len(evicted)
        for gone in evicted:
            self._forget_backlog(gone.id)
            if self.directory is None or gone.id not in self.directory:
                self._changes.append(Change(gone.id, False))
        return True

    def _use_epoch(self, record: Record) -> None:
        for shared in _shared_by(record):
            if self.memory.get(shared) is None and self.directory is not None and shared in self.directory:
                self.directory.use(shared)

    def _add_backlog(self, record: Record) -> None:
        self._forget_backlog(record.id)
        self._backlog[record.id] = record.nbytes
        self._waiting += record.nbytes

    def _forget_backlog(self, record: RecordId) -> None:
        self._waiting -= self._backlog.pop(record, 0)


def _shared_by(page: Record) -> list[RecordId]:
    """What a page cannot be read without."""
    epoch = page.meta.epoch
    if not epoch:
        return []
    return [(RecordKind.EPOCH, epoch_key(epoch)), (RecordKind.TRANSFORM, transform_key(epoch))]
