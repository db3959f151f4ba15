"""What a client waits for."""

from __future__ import annotations

import dataclasses
import time
from concurrent.futures import Future

from sglang_mosaic.manager.client import Ticket
from sglang_mosaic.manager.store.record import RecordId
from sglang_mosaic.wire.messages import Fetched, Meta, Payload, Slot


@dataclasses.dataclass
class PutUnderWay:
    """A payload on its way to the manager."""

    record: RecordId
    meta: Meta
    offset: int
    """Of a part."""
    total: int
    """Bytes of the record."""
    holder: int
    """Who has the slot, for the allocator; the message's ticket is a later one."""
    slot: Slot
    written: Future[Payload]
    upload: Upload | None = None


@dataclasses.dataclass(eq=False)
class Upload:
    """A record that is larger than a slot."""

    key: bytes
    meta: Meta
    data: bytes
    offset: int = 0
    unanswered: int = 0
    calibration: Calibration | None = None


@dataclasses.dataclass
class FetchUnderWay:
    """A record on its way from the manager, part by part."""

    ticket: Ticket
    record: RecordId
    slot: Slot
    deadline: float
    asked: float = dataclasses.field(default_factory=time.monotonic)
    seconds: float = 0.0
    """As of `Completion.seconds`, of the parts that are here."""
    copy_seconds: float = 0.0
    parts: bytearray = dataclasses.field(default_factory=bytearray)
    total: int | None = None
    meta: Meta | None = None
    """Of the first part; later ones must have the same."""


@dataclasses.dataclass
class Reading:
    """A payload on its way from a slot to memory of this side."""

    fetch: FetchUnderWay
    reply: Fetched
    data: memoryview
    answered: float
    """When the manager said that it was there."""
    done: Future[None]
    """WireError: it is not what was meant."""
    began: float = dataclasses.field(default_factory=time.monotonic)


@dataclasses.dataclass
class Calibration:
    """Statistics on their way to the manager, then a calibration that it runs."""

    ticket: Ticket
    deadline: float
    sent: int | None = None
    """Ticket of the message."""
