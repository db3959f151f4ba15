"""The host memory tier."""

from __future__ import annotations

from sglang_mosaic.manager.store.eviction import EvictionPolicy
from sglang_mosaic.manager.store.record import Record, RecordId


class MemoryTier:
    """Records in memory, together at most so many bytes.

    Args:
        limit_bytes: most bytes of all records (Record.nbytes).
        policy: who goes first.
    """

    def __init__(self, limit_bytes: int, policy: EvictionPolicy) -> None:
        self.limit_bytes = limit_bytes
        self.nbytes = 0
        self.restored_bytes = 0
        """What the records would restore to."""
        self._policy = policy
        self._records: dict[RecordId, Record] = {}

    def __len__(self) -> int:
        return len(self._records)

    def __contains__(self, record: RecordId) -> bool:
        return record in self._records

    def ids(self) -> list[RecordId]:
        """All records."""
        return list(self._records)

    def get(self, record: RecordId) -> Record | None:
        """A record, which counts as used; None if it is not here."""
        found = self._records.get(record)
        if found is not None:
            self._policy.use(record)
        return found

    def peek(self, record: RecordId) -> Record | None:
        """A record without using it; None if it is not here."""
        return self._records.get(record)

    def put(self, record: Record) -> list[Record] | None:
        """Keep a record, in place of one of the same id.

        Returns:
            The records that had to go, or None: it is larger than the tier, and nothing changed.
        """
        if record.nbytes > self.limit_bytes:
            return None
        self.remove(record.id)
        evicted = []
        while self.nbytes + record.nbytes > self.limit_bytes:
            evicted.append(self._records[self._policy.victim()])
            self.remove(evicted[-1].id)
        self._records[record.id] = record
        self.nbytes += record.nbytes
        self.restored_bytes += record.length
        self._policy.use(record.id)
        return evicted

    def replace(self, record: Record) -> None:
        """Put a smaller record in the place of one of the same id, which does not count as using it."""
        before = self._records[record.id]
        self._records[record.id] = record
        self.nbytes += record.nbytes - before.nbytes
        self.restored_bytes += record.length - before.length

    def coldest_first(self) -> list[Record]:
        """All records, who goes first before the others."""
        return [self._records[record] for record in self._policy.order()]

    def remove(self, record: RecordId) -> None:
        """Drop a record; nothing happens if it is not here."""
        found = self._records.pop(record, None)
        if found is not None:
            self.nbytes -= found.nbytes
            self.restored_bytes -= found.length
            self._policy.forget(record)
