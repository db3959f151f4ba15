"""The client's logic, whatever carries the messages: tickets, slots, the local index, deadlines, uploads in parts."""

from __future__ import annotations

import dataclasses
import itertools
import time
from abc import abstractmethod
from collections import OrderedDict, deque
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

from sglang_mosaic.manager.client import ClientCounters, Completion, Lookup, ManagerClient, Status, Ticket
from sglang_mosaic.manager.keys import epoch_key, statistics_key
from sglang_mosaic.manager.options import ManagerOptions
from sglang_mosaic.manager.store.record import RecordId
from sglang_mosaic.manager.under_way import Calibration, FetchUnderWay, PutUnderWay, Reading, Upload
from sglang_mosaic.wire import messages as wire
from sglang_mosaic.wire.buffers import Allocate, Buffers, usual_memory
from sglang_mosaic.wire.messages import Meta, Payload, RecordKind, Slot, WireError
from sglang_mosaic.wire.slots import BACK_THREADS, OUT_THREADS, SlotAllocator, SlotMemory

EPOCHS = 4
"""Epochs that are given to a new manager again."""
KEPT_BYTES = 1 << 30
"""Of buffers for pages that have come back, between two restores."""
MESSAGES_PER_POLL = 1024
"""Most messages that one poll looks at: bounds its time. More than there are slots: no answer that is there may count
as late."""


class SlottedClient(ManagerClient):
    """Everything but the way of the messages.

    Args:
        options: sizes and times.
        allocate: gives memory for pages that come back.
    """

    def __init__(self, options: ManagerOptions, allocate: Allocate = usual_memory) -> None:
        self.options = options
        self.counters = ClientCounters()
        self._numbers = itertools.count(1)
        self._completions: list[Completion] = []
        self._known: set[RecordId] = set()
        self._epochs: OrderedDict[str, bytes] = OrderedDict()
        self._calibrations: dict[Ticket, Calibration] = {}
        self._metrics: dict[str, Any] = {}
        self._answered = 0.0
        """When the manager gave its last answer to a fetch."""
        self._reading = ThreadPoolExecutor(BACK_THREADS, "mosaic-read")
        self._writing = ThreadPoolExecutor(OUT_THREADS, "mosaic-write")
        self._writes: deque[PutUnderWay] = deque()
        """That the manager has not been told of, as their bytes are not all in their slots."""
        self._reads: list[Reading] = []
        """Begun by this poll."""
        self._puts: dict[int, PutUnderWay] = {}
        self._fetches: dict[int, FetchUnderWay] = {}
        self._pending: set[RecordId] = set()
        self._uploads: deque[Upload] = deque()
        self._buffers = Buffers(KEPT_BYTES, allocate)
        memory = SlotMemory.create(options.slots, options.slot_bytes)
        self._slots = SlotAllocator(memory.slots)
        self._stale = 0
        self._begin(memory)

    # What a way of messages has to offer besides `connected`.

    @abstractmethod
    def _send(self, data: bytes) -> bool:
        """Send a message without waiting; False: there is no room, or nobody to send it to."""

    @abstractmethod
    def _receive(self) -> bytes | None:
        """The next message, if there is one."""

    def prepare(self, nbytes: int) -> None:
        """Have memory for pages of so many bytes before the first comes back. Once there is a manager: a new one gets
        slots of its own."""
        self._buffers.prepare(nbytes)
        self._memory.touch(nbytes)

    # The contract.

    @property
    def room(self) -> int:
        return self._slots.free

    def put(self, key: bytes, meta: Meta, data: bytes | memoryview) -> bool:
        if not 0 < len(data) <= self._memory.slot_bytes:
            raise ValueError(f"data must have 1 to {self._memory.slot_bytes} bytes, got {len(data)}")
        record = meta.kind, key
        if record in self._known or record in self._pending:
            self.counters.puts_known += 1
            return True
        if not self._hand_over(record, meta, data, 0, len(data)):
            self.counters.puts_dropped += 1
            return False
        self._pending.add(record)
        self.counters.puts += 1
        self._send_writes()
        return True

    def put_epoch(self, hash_: str, data: bytes) -> None:
        self._epochs[hash_] = data
        self._epochs.move_to_end(hash_)
        while len(self._epochs) > EPOCHS:
            self._epochs.popitem(last=False)
        self._offer_epochs()

    def lookup(self, key: bytes) -> Lookup:
        record = RecordKind.PAGE, key
        if not self.connected:
            return Lookup.MISS
        if record in self._known:
            return Lookup.HIT
        return Lookup.PENDING if record in self._pending else Lookup.MISS

    def fetch(self, key: bytes, *, timeout_s: float = 1.0, kind: RecordKind = RecordKind.PAGE) -> Ticket:
        ticket = next(self._numbers)
        self.counters.fetches += 1
        self._ask(FetchUnderWay(ticket, (kind, key), Slot(0, 0), time.monotonic() + timeout_s))
        return ticket

    def fetch_epoch(self, hash_: str, *, timeout_s: float = 10.0) -> Ticket:
        return self.fetch(epoch_key(hash_), timeout_s=timeout_s, kind=RecordKind.EPOCH)

    def calibrate(self, statistics: bytes, *, timeout_s: float = 300.0) -> Ticket:
        ticket = next(self._numbers)
        calibration = self._calibrations[ticket] = Calibration(ticket, time.monotonic() + timeout_s)
        if self.connected:
            meta = Meta(RecordKind.STATISTICS)
            self._uploads.append(Upload(statistics_key(ticket), meta, statistics, calibration=calibration))
            self._send_uploads()
        else:
            self._end(ticket, Status.MISS)
        return ticket

    def poll(self) -> list[Completion]:
        for _ in range(MESSAGES_PER_POLL):
            data = self._receive()
            if data is None:
                break
            try:
                self._take(wire.decode_reply(data))
            except WireError:
                self.counters.refused += 1
        self._take_reads()
        self._expire(time.monotonic())
        self._send_writes()
        self._send_uploads()
        completions, self._completions = self._completions, []
        return completions

    def cancel(self, ticket: Ticket) -> None:
        for number, fetch in list(self._fetches.items()):
            if fetch.ticket == ticket:
                self._slots.give_back(number, fetch.slot)
                del self._fetches[number]
        calibration = self._calibrations.pop(ticket, None)
        if calibration is not None and calibration.sent is not None:
            self._post(wire.Cancel(ticket=next(self._numbers), cancelled=calibration.sent))
        self._uploads = deque(u for u in self._uploads if u.calibration is None or u.calibration.ticket != ticket)
        self._completions = [completion for completion in self._completions if completion.ticket != ticket]

    def stats(self) -> dict[str, object]:
        return {
            "client": dataclasses.asdict(self.counters),
            "connected": self.connected,
            "slots_free": self._slots.free,
            "slots_stale": self._stale + self._slots.stale,
            "known_records": len(self._known),
            "uploads": len(self._uploads),
            "manager": self._metrics,
        }

    # For the subclasses.

    def _end_threads(self) -> None:
        """After which nothing can be copied."""
        self._writing.shutdown()
        self._reading.shutdown()

    def _begin(self, memory: SlotMemory) -> None:
        """Start with new slots and without knowledge, as for a new manager."""
        self._memory = memory
        self._stale += self._slots.stale
        self._slots = SlotAllocator(memory.slots)
        self._known.clear()
        self._puts.clear()
        self._fetches.clear()
        self._pending.clear()
        self._uploads.clear()

    def _drop_outstanding(self) -> None:
        """Nobody will answer: everything under way ends as a miss, and its slots are free again."""
        wait([put.written for put in self._writes if not put.written.cancel()])
        for put in (*self._writes, *self._puts.values()):
            self._slots.give_back(put.holder, put.slot)
        for number, fetch in self._fetches.items():
            self._slots.give_back(number, fetch.slot)
            self._finish(fetch, None)
        for ticket in list(self._calibrations):
            self._end(ticket, Status.MISS)
        self._writes.clear()
        self._puts.clear()
        self._fetches.clear()
        self._pending.clear()
        self._uploads.clear()

    def _ready(self) -> None:
        """A manager is there, and what it has is known here."""
        self._offer_epochs()

    def _post(self, message: wire.Request) -> bool:
        return self._send(wire.encode(message))

    # Puts.

    def _hand_over(
        self, record: RecordId, meta: Meta, data: bytes | memoryview, offset: int, total: int, of: Upload | None = None
    ) -> bool:
        """Put bytes into a slot and then tell the manager; False: there is no slot, or no manager."""
        if not self.connected:
            return False
        holder = next(self._numbers)
        slot = self._slots.take(holder)
        if slot is None:
            return False
        written = self._writing.submit(self._memory.write, slot, record[1], data)
        self._writes.append(PutUnderWay(record, meta, offset, total, holder, slot, written, of))
        return True

    def _send_writes(self, until: RecordId | None = None, all_: bool = False) -> None:
        """Tell the manager what is in slots now.

        Args:
            until: wait until it is told of this record.
            all_: wait until it is told of all.
        """
        while self._writes and (all_ or until is not None or self._writes[0].written.done()):
            put = self._writes.popleft()
            number, payload = next(self._numbers), put.written.result()
            kind, key = put.record
            message = wire.Put(
                ticket=number, key=key, meta=put.meta, payload=payload, offset=put.offset, total=put.total
            )
            if self._post(message):
                self._puts[number] = put
            else:
                self._slots.give_back(put.holder, put.slot)
                self._pending.discard(put.record)
                if put.upload is None:
                    self.counters.puts_dropped += 1
                else:
                    self._part_stored(put.upload, False)
            if put.record == until:
                return

    def _offer_epochs(self) -> None:
        waiting = {upload.key for upload in self._uploads}
        for hash_, data in self._epochs.items():
            key = epoch_key(hash_)
            if self.connected and key not in waiting and (RecordKind.EPOCH, key) not in self._known:
                self._uploads.append(Upload(key, Meta(RecordKind.EPOCH), data))
        self._send_uploads()

    def _send_uploads(self) -> None:
        """The next parts, in at most half of the slots: pages must not wait for them."""
        while self._uploads and self._slots.free > self.options.slots // 2:
            upload = self._uploads[0]
            if upload.offset >= len(upload.data):
                return
            part = memoryview(upload.data)[upload.offset : upload.offset + self._memory.slot_bytes]
            record = upload.meta.kind, upload.key
            if not self._hand_over(record, upload.meta, part, upload.offset, len(upload.data), upload):
                return
            upload.offset += len(part)
            upload.unanswered += 1

    # Fetches.

    def _ask(self, fetch: FetchUnderWay) -> None:
        if fetch.record in self._pending and any(put.record == fetch.record for put in self._writes):
            self._send_writes(until=fetch.record)
        number = next(self._numbers)
        slot = self._slots.take(number) if self.connected else None
        if slot is None:
            self._finish(fetch, None)
            return
        fetch.slot = slot
        kind, key = fetch.record
        offset = len(fetch.parts)
        message = wire.Fetch(ticket=number, kind=kind, key=key, slot=slot, deadline=fetch.deadline, offset=offset)
        if self._post(message):
            self._fetches[number] = fetch
        else:
            self._slots.give_back(number, slot)
            self._finish(fetch, None)

    def _finish(self, fetch: FetchUnderWay, data: bytes | memoryview | None) -> None:
        if data is None:
            self.counters.misses += 1
            self._end(fetch.ticket, Status.MISS, fetch.record[1])
        else:
            self.counters.hits += 1
            times = fetch.seconds, fetch.copy_seconds
            self._end(fetch.ticket, Status.OK, fetch.record[1], fetch.meta, data, *times)

    def _end(
        self,
        ticket: Ticket,
        status: Status,
        key: bytes = b"",
        meta: Meta | None = None,
        data: bytes | memoryview = b"",
        seconds: float = 0.0,
        copy_seconds: float = 0.0,
    ) -> None:
        self._calibrations.pop(ticket, None)
        self._completions.append(Completion(ticket, status, key, meta, data, seconds, copy_seconds))

    def _expire(self, now: float) -> None:
        for number, fetch in list(self._fetches.items()):
            if now > fetch.deadline:
                del self._fetches[number]
                self._slots.give_back(number, fetch.slot)
                self.counters.deadlines += 1
                self._finish(fetch, None)
        for ticket, calibration in list(self._calibrations.items()):
            if now > calibration.deadline:
                self.cancel(ticket)
                self._end(ticket, Status.MISS)

    # Replies.

    def _take(self, reply: wire.Reply) -> None:
        if isinstance(reply, wire.Known):
            self._known.update((reply.kind, key) for key in wire.split_keys(reply.keys))
        elif isinstance(reply, wire.Gone):
            self._known.difference_update((reply.kind, key) for key in wire.split_keys(reply.keys))
        elif isinstance(reply, wire.Stored):
            self._stored(reply)
        elif isinstance(reply, wire.Fetched):
            self._fetched(reply)
        elif isinstance(reply, wire.Calibrated):
            self._calibrated(reply)
        elif isinstance(reply, wire.Pong):
            self._metrics = reply.metrics

    def _stored(self, reply: wire.Stored) -> None:
        put = self._puts.get(reply.ticket)
        if put is None or not self._slots.give_back(put.holder, reply.slot):
            raise WireError("an answer to a put that nobody waits for")
        del self._puts[reply.ticket]
        self._pending.discard(put.record)
        if not reply.accepted:
            self.counters.puts_refused += 1
        if put.upload is None:
            if reply.accepted:
                self._known.add(put.record)
        else:
            self._part_stored(put.upload, reply.accepted)

    def _part_stored(self, upload: Upload, accepted: bool) -> None:
        upload.unanswered -= 1
        if not accepted:
            self._uploads = deque(other for other in self._uploads if other is not upload)
            if upload.calibration is not None and upload.calibration.ticket in self._calibrations:
                self._end(upload.calibration.ticket, Status.MISS)
            return
        if upload.offset < len(upload.data) or upload.unanswered or upload not in self._uploads:
            return
        self._uploads.remove(upload)
        if upload.calibration is not None:
            number = next(self._numbers)
            upload.calibration.sent = number
            if not self._post(wire.Calibrate(ticket=number, key=upload.key)):
                self._end(upload.calibration.ticket, Status.MISS)

    def _fetched(self, reply: wire.Fetched) -> None:
        fetch = self._fetches.get(reply.ticket)
        if fetch is None or reply.key != fetch.record[1] or not self._slots.holds(reply.ticket, reply.slot):
            raise WireError("an answer to a fetch that nobody waits for")
        del self._fetches[reply.ticket]
        payload = reply.payload
        data = None if payload is None else self._memory_for(fetch, reply, payload)
        if payload is None or data is None:
            self._slots.give_back(reply.ticket, reply.slot)
            self._finish(fetch, None)
            return
        now = time.monotonic()
        # A time that cannot be is none: the manager may say anything.
        answered = reply.answered if fetch.asked <= reply.answered <= now else now
        done = self._reading.submit(self._memory.read_into, payload, reply.key, data)
        self._reads.append(Reading(fetch, reply, data, answered, done))

    def _memory_for(self, fetch: FetchUnderWay, reply: wire.Fetched, payload: Payload) -> memoryview | None:
        """Memory for a part of a record; None: it is none of what was asked for."""
        meta, rest = reply.meta, reply.total - len(fetch.parts)
        fits = payload.slot == reply.slot and 0 < payload.length <= min(rest, self._memory.slot_bytes)
        follows = fetch.meta is None or (fetch.meta, fetch.total) == (meta, reply.total)
        if meta is None or meta.kind is not fetch.record[0] or not fits or not follows:
            self._refuse(fetch)
            return None
        fetch.meta, fetch.total = meta, reply.total
        if meta.kind is RecordKind.PAGE:
            return self._buffers.take(payload.length)
        return memoryview(bytearray(payload.length))

    def _take_reads(self) -> None:
        """What this poll reads, once it is here: a page that comes a turn later may come a long forward later."""
        reads, self._reads = self._reads, []
        wait([reading.done for reading in reads])
        now, worked = time.monotonic(), self._worked(reads)
        for reading in reads:
            self._slots.give_back(reading.reply.ticket, reading.reply.slot)
            reading.fetch.seconds += worked / len(reads)
            reading.fetch.copy_seconds += (now - reads[0].began) / len(reads)
            self._read(reading)

    def _worked(self, reads: list[Reading]) -> float:
        """Seconds in which the manager had one of these to answer, after all answers before. It answers several at a
        time, so that each one's own says nothing."""
        worked = 0.0
        for reading in sorted(reads, key=lambda reading: reading.answered):
            worked += max(reading.answered - max(reading.fetch.asked, self._answered), 0.0)
            self._answered = max(self._answered, reading.answered)
        return worked

    def _read(self, reading: Reading) -> None:
        fetch, data = reading.fetch, reading.data
        if reading.done.exception() is not None:
            self._refuse(fetch)
            self._finish(fetch, None)
        elif len(fetch.parts) + len(data) == fetch.total:
            self._finish(fetch, b"".join((fetch.parts, data)) if fetch.parts else data)
        else:
            fetch.parts += data
            fetch.asked = time.monotonic()
            self._ask(fetch)

    def _refuse(self, fetch: FetchUnderWay) -> None:
        self.counters.refused += 1
        # When the page is evicted again, the manager gets it again.
        self._known.discard(fetch.record)

    def _calibrated(self, reply: wire.Calibrated) -> None:
        for calibration in self._calibrations.values():
            if calibration.sent == reply.ticket:
                break
        else:
            raise WireError("an answer to a calibration that nobody waits for")
        if reply.key is None:
            self._end(calibration.ticket, Status.MISS)
            return
        del self._calibrations[calibration.ticket]
        record = RecordKind.EPOCH, reply.key
        self.counters.fetches += 1
        self._ask(FetchUnderWay(calibration.ticket, record, Slot(0, 0), calibration.deadline))
