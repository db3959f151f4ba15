"""What can be seen of a manager from outside. Plain numbers; the adapter exports them."""

from __future__ import annotations

import bisect
import dataclasses

BOUNDS_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Upper bounds of the buckets of latencies, seconds; a last bucket has the rest."""


@dataclasses.dataclass
class Histogram:
    """Counts of durations."""

    counts: list[int] = dataclasses.field(default_factory=lambda: [0] * (len(BOUNDS_S) + 1))
    seconds: float = 0.0
    """Their sum."""

    def add(self, seconds: float) -> None:
        """Count one."""
        self.counts[bisect.bisect_left(BOUNDS_S, seconds)] += 1
        self.seconds += seconds


@dataclasses.dataclass
class ManagerMetrics:
    """Counters since the manager started, and gauges as of now; bytes, pages and seconds."""

    memory_records: int = 0
    memory_bytes: int = 0
    memory_restored_bytes: int = 0
    """What the records in memory would restore to."""
    disk_records: int = 0
    disk_bytes: int = 0
    backlog: int = 0
    """Pages that wait for recompression."""
    stored: int = 0
    evicted: int = 0
    """Records that memory had no room for any more."""
    recompressed: int = 0
    recompressed_from: int = 0
    recompressed_to: int = 0
    """Bytes before and after."""
    transformed: int = 0
    transformed_from: int = 0
    transformed_to: int = 0
    """The same of cold pages, which were recompressed before."""
    fetches: int = 0
    hits_memory: int = 0
    hits_disk: int = 0
    misses: int = 0
    expired: int = 0
    """Fetches whose deadline had passed when their turn came."""
    refused_messages: int = 0
    """What was no message, a replay, or from a stranger."""
    refused_payloads: int = 0
    """Payloads that did not match their checksum or slot."""
    refused_records: int = 0
    """Records that were damaged when they were needed."""
    refused_full: int = 0
    """Puts that no tier had room for."""
    refused_writes: int = 0
    """Records that the directory's disk did not take; they stay in memory alone."""
    calibrations: int = 0
    calibrations_failed: int = 0
    restore: Histogram = dataclasses.field(default_factory=Histogram)
    """From the arrival of a fetch that hit until its bytes lay in the slot."""

    def as_dict(self) -> dict[str, int | float | list[int]]:
        """JSON-serialisable and flat."""
        plain = dataclasses.asdict(self)
        restore = plain.pop("restore")
        return {**plain, "restore_counts": restore["counts"], "restore_seconds": restore["seconds"]}
