"""What a server sees of its manager: one contract, in process or over ZMQ."""

from __future__ import annotations

import dataclasses
import enum
from abc import ABC, abstractmethod

from sglang_mosaic.wire.messages import Meta, RecordKind

Ticket = int
"""A question under way."""


class Lookup(enum.Enum):
    """What is known about a page without asking anybody."""

    MISS = "miss"
    HIT = "hit"
    """The manager had it when it last said so. A fetch may still miss."""
    PENDING = "pending"
    """On its way there; a fetch would be answered after it has arrived."""


class Status(enum.Enum):
    """How a question ended."""

    OK = "ok"
    MISS = "miss"
    """Not there, damaged, too late, or the manager died: go on without it."""


@dataclasses.dataclass(frozen=True)
class Completion:
    """Answer to a ticket. Every ticket that is not cancelled gets exactly one."""

    ticket: Ticket
    status: Status
    key: bytes = b""
    """Of the record."""
    meta: Meta | None = None
    """With OK."""
    data: bytes | memoryview = b""
    """With OK: the record's own bytes, checked; of a calibration, the epoch's. Of a page, to be let go of soon: the
    memory is used again."""
    seconds: float = 0.0
    """With OK: what the manager took for a record, from the question or, if that was later, from its answer before, on
    average over those that one `poll` found; by its own word, so that it does not matter when that was."""
    copy_seconds: float = 0.0
    """The same of this side, which copies and checks what the manager gives."""


@dataclasses.dataclass
class ClientCounters:
    """What this side counted since it began."""

    puts: int = 0
    """Accepted by `put`."""
    puts_dropped: int = 0
    """Not accepted: no slot was free, or no manager there."""
    puts_known: int = 0
    """Not copied: the manager has the page already."""
    puts_refused: int = 0
    """By the manager."""
    fetches: int = 0
    hits: int = 0
    misses: int = 0
    deadlines: int = 0
    """Of the misses: nobody answered in time."""
    refused: int = 0
    """Messages that were none, late or replayed, and payloads that did not match."""
    deaths: int = 0
    """Managers that ended or had to be killed."""
    silences: int = 0
    """Times that a manager stopped answering."""


class ManagerClient(ABC):
    """One server's view. Not for use from two threads.

    No method but `close` waits for the manager: each takes microseconds, and `poll` as long as copying what has come.
    The manager may be absent, dead, stopped or lying at any time; the worst that follows is a miss.
    """

    @property
    @abstractmethod
    def connected(self) -> bool:
        """Whether there is a manager that answers."""

    @property
    @abstractmethod
    def room(self) -> int:
        """Payloads that may go on their way now, puts and fetches together."""

    @abstractmethod
    def put(self, key: bytes, meta: Meta, data: bytes | memoryview) -> bool:
        """Hand over an evicted page.

        Args:
            key: 16 bytes (keys.page_keys).
            meta: kind PAGE.
            data: the frame, at most `slot_bytes` of the options; not to be written to any more.

        Returns:
            False: dropped, and counted, as nothing may wait for room.

        Raises:
            ValueError: data is larger than a slot, or empty.
        """

    @abstractmethod
    def put_epoch(self, hash_: str, data: bytes) -> None:
        """Make an epoch known, so that its pages can be compressed, and decoded after a restart. The last few are given
        to every new manager again, by `poll`.

        Args:
            hash_: of the epoch; `data`: its bytes (codec/storage.epoch_to_bytes).
        """

    @abstractmethod
    def lookup(self, key: bytes) -> Lookup:
        """What is known about a page. Answered from a local index."""

    @abstractmethod
    def fetch(self, key: bytes, *, timeout_s: float = 1.0, kind: RecordKind = RecordKind.PAGE) -> Ticket:
        """Ask for a record. A miss, too, is told by `poll`."""

    @abstractmethod
    def fetch_epoch(self, hash_: str, *, timeout_s: float = 10.0) -> Ticket:
        """Ask for an epoch by its hash."""

    @abstractmethod
    def calibrate(self, statistics: bytes, *, timeout_s: float = 300.0) -> Ticket:
        """Ask for an epoch made of statistics (codec/calibration_job.py). One at a time."""

    @abstractmethod
    def poll(self) -> list[Completion]:
        """Move everything on and tell what ended. Call once per scheduler step, and while idle a few times a second."""

    @abstractmethod
    def cancel(self, ticket: Ticket) -> None:
        """Nobody wants the answer any more: `poll` will not tell it. Nothing happens if it was told."""

    @abstractmethod
    def stats(self) -> dict[str, object]:
        """Counters of both sides, JSON-serialisable; the manager's as of its last heartbeat, none without a manager."""

    @abstractmethod
    def close(self) -> None:
        """Let the manager finish what it accepted, and end it; waits for that for a bounded time. Idempotent."""
