"""Both ends against a peer that sends anything: refused and counted, never a crash, never a wrong page."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from manager_cases import frames
from sglang_mosaic.manager.client import Status
from sglang_mosaic.manager.keys import epoch_key
from sglang_mosaic.manager.options import ManagerOptions
from sglang_mosaic.manager.service import Service
from sglang_mosaic.manager.slotted_client import SlottedClient
from sglang_mosaic.wire import messages as wire
from sglang_mosaic.wire.messages import Meta, RecordKind, Slot, WireError
from sglang_mosaic.wire.slots import SlotMemory

OPTIONS = ManagerOptions(slot_bytes=len(frames().frames[0]), slots=4)
FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture
def memory() -> Iterator[SlotMemory]:
    memory = SlotMemory.create(OPTIONS.slots, OPTIONS.slot_bytes)
    yield memory
    memory.close()


def puts(memory: SlotMemory, ticket: int = 1, page: int = 0) -> wire.Put:
    case = frames()
    payload = memory.write(Slot(page % OPTIONS.slots, 1), case.keys[page], case.frames[page])
    return wire.Put(ticket=ticket, key=case.keys[page], meta=case.meta, payload=payload, total=payload.length)


def fetches(ticket: int, key: bytes, offset: int = 0, slot: int = 3) -> wire.Fetch:
    return wire.Fetch(
        ticket=ticket, kind=RecordKind.PAGE, key=key, slot=Slot(slot, 9), deadline=float("inf"), offset=offset
    )


def one(replies: list[wire.Reply]) -> wire.Reply:
    (reply,) = replies
    return reply


def test_a_service_keeps_and_gives_back(memory: SlotMemory) -> None:
    service = Service(memory, OPTIONS)
    assert one(service.handle(wire.encode(puts(memory)))).accepted
    reply = one(service.handle(wire.encode(fetches(2, frames().keys[0]))))
    assert memory.read(reply.payload, reply.key) == frames().frames[0]


def test_a_replayed_message_is_refused(memory: SlotMemory) -> None:
    service = Service(memory, OPTIONS)
    data = wire.encode(puts(memory))
    assert one(service.handle(data)).accepted
    assert service.handle(data) == []
    assert service.handle(wire.encode(wire.Goodbye(ticket=1))) == []
    assert not service.leaving
    assert service.metrics.refused_messages == 2


@pytest.mark.parametrize("at", [0, 1000, OPTIONS.slot_bytes - 1])
def test_a_flipped_bit_of_a_payload_is_refused(memory: SlotMemory, at: int) -> None:
    service = Service(memory, OPTIONS)
    message = puts(memory)
    damaged = bytearray(frames().frames[0])
    damaged[at] ^= 4
    memory.write(message.payload.slot, message.key, bytes(damaged))
    assert not one(service.handle(wire.encode(message))).accepted
    assert service.metrics.refused_payloads == 1
    assert one(service.handle(wire.encode(fetches(2, message.key)))).payload is None


@pytest.mark.parametrize(
    "change",
    [
        {"total": 1},
        {"total": 1 << 40},
        {"offset": -1},
        {"offset": 5, "total": OPTIONS.slot_bytes * 2},
        {"meta": Meta(RecordKind.PAGE, 1 << 32)},
        {"meta": Meta(RecordKind.PAGE, -1)},
        {"meta": Meta(RecordKind.PAGE, 3, "x" * 33)},
        {"meta": Meta(RecordKind.PAGE, 3, "é")},
    ],
    ids=str,
)
def test_a_put_that_makes_no_sense_is_refused(memory: SlotMemory, change: dict) -> None:
    service = Service(memory, OPTIONS)
    message = msgspec.structs.replace(puts(memory), **change)
    assert not one(service.handle(wire.encode(message))).accepted
    assert service.store.ids() == []


@pytest.mark.parametrize("slot, offset", [(-1, 0), (4, 0), (2**40, 0), (0, -1), (0, 1 << 40)])
def test_a_fetch_that_makes_no_sense_is_a_miss(memory: SlotMemory, slot: int, offset: int) -> None:
    service = Service(memory, OPTIONS)
    service.handle(wire.encode(puts(memory)))
    assert one(service.handle(wire.encode(fetches(2, frames().keys[0], offset, slot)))).payload is None
    assert service.metrics.refused_messages == 1


def test_frames_that_are_none_of_their_epoch_are_dropped(memory: SlotMemory) -> None:
    case = frames()
    service = Service(memory, OPTIONS)
    nonsense = bytes([255]) * len(case.frames[0])
    payload = memory.write(Slot(0, 1), case.keys[0], nonsense)
    message = wire.Put(ticket=1, key=case.keys[0], meta=case.meta, payload=payload, total=len(nonsense))
    service.handle(wire.encode(message))
    service._keep(epoch_key(case.epoch.hash), Meta(RecordKind.EPOCH), case.epoch_bytes)
    while service.work():
        pass
    assert service.metrics.refused_records == 1
    assert one(service.handle(wire.encode(fetches(2, case.keys[0])))).payload is None


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """A message with a few bits flipped, a part cut out or doubled, or something else entirely."""
    result = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        how = draw(st.sampled_from(["flip", "cut", "double", "random"]))
        at = draw(st.integers(0, max(len(result) - 1, 0)))
        if how == "flip" and result:
            result[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "cut":
            del result[at : at + draw(st.integers(1, 8))]
        elif how == "double":
            result[at:at] = result[at : at + 8]
        elif how == "random":
            result[at:at] = draw(st.binary(max_size=10))
    return bytes(result)


@FUZZ
@given(data=st.data())
def test_a_service_survives_anything(data: st.DataObject) -> None:
    case = frames()
    memory = SlotMemory.create(OPTIONS.slots, OPTIONS.slot_bytes)
    try:
        service = Service(memory, OPTIONS)
        service.handle(wire.encode(puts(memory)))
        kinds = [
            lambda ticket: puts(memory, ticket, data.draw(st.integers(0, 5))),
            lambda ticket: fetches(ticket, data.draw(st.sampled_from(case.keys[:6]))),
            lambda ticket: wire.Calibrate(ticket=ticket, key=case.keys[0]),
            lambda ticket: wire.Ping(ticket=ticket),
            lambda ticket: wire.Cancel(ticket=ticket, cancelled=1),
        ]
        for ticket in range(2, 12):
            message = wire.encode(data.draw(st.sampled_from(kinds))(ticket))
            replies = service.handle(data.draw(damaged(message)))
            for reply in replies:
                if isinstance(reply, wire.Fetched) and reply.payload is not None:
                    found = memory.read(reply.payload, reply.key)
                    assert found == case.frames[case.keys.index(reply.key)][-len(found) :]
            service.collect()
        for record_kind, key in service.store.ids():
            # Whatever was accepted is what belongs to its key.
            body = service.store.get((record_kind, key)).body
            assert body == case.frames[case.keys.index(key)]
    finally:
        memory.close()


class AtOnce(ThreadPoolExecutor):
    """In the caller's thread, so that a test knows what has been copied."""

    def submit(self, work: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        try:
            done.set_result(work(*args, **kwargs))
        except WireError as error:
            done.set_exception(error)
        return done


class Scripted(SlottedClient):
    """A client whose manager says what a test wants."""

    connected = True

    def __init__(self) -> None:
        super().__init__(OPTIONS)
        self._reading = self._writing = AtOnce()
        self.sent: list[bytes] = []
        self.inbox: deque[bytes] = deque()

    def _send(self, data: bytes) -> bool:
        self.sent.append(data)
        return True

    def _receive(self) -> bytes | None:
        return self.inbox.popleft() if self.inbox else None

    def close(self) -> None:
        self._memory.close()


@pytest.fixture
def client() -> Iterator[Scripted]:
    client = Scripted()
    yield client
    client.close()


def reply_to(client: Scripted, page: int = 0) -> wire.Fetched:
    """The right answer to the last fetch."""
    request = wire.decode_request(client.sent[-1])
    data = frames().frames[page]
    payload = client._memory.write(request.slot, request.key, data)
    return wire.Fetched(
        ticket=request.ticket,
        slot=request.slot,
        key=request.key,
        meta=frames().meta,
        payload=payload,
        total=len(data),
    )


def hear(client: Scripted, reply: wire.Reply) -> list:
    client.inbox.append(wire.encode(reply))
    return client.poll()


def test_the_right_answer_is_taken_once(client: Scripted) -> None:
    client.fetch(frames().keys[0])
    reply = reply_to(client)
    (found,) = hear(client, reply)
    assert found.data == frames().frames[0]
    assert hear(client, reply) == []
    assert client.counters.refused == 1
    assert client.stats()["slots_free"] == OPTIONS.slots


def test_an_answer_of_a_slot_that_is_somebody_elses_by_now_is_refused(client: Scripted) -> None:
    client.cancel(client.fetch(frames().keys[0]))
    late = reply_to(client)
    client.fetch(frames().keys[1])
    # The slot is the same one, in another life.
    current = reply_to(client, 1)
    assert current.slot.index == late.slot.index
    assert hear(client, late) == []
    forged = msgspec.structs.replace(late, ticket=current.ticket, key=current.key)
    assert hear(client, forged) == []
    assert client.counters.refused == 2
    assert client.stats()["slots_stale"] == 1
    (found,) = hear(client, current)
    assert found.data == frames().frames[1]


@pytest.mark.parametrize("at", [0, 5000, OPTIONS.slot_bytes - 1])
def test_a_page_that_was_damaged_on_its_way_is_a_miss(client: Scripted, at: int) -> None:
    client.fetch(frames().keys[0])
    reply = reply_to(client)
    damaged_frame = bytearray(frames().frames[0])
    damaged_frame[at] ^= 1
    client._memory.write(reply.slot, reply.key, bytes(damaged_frame))
    (found,) = hear(client, reply)
    assert found.status is Status.MISS
    assert client.counters.refused == 1


@pytest.mark.parametrize(
    "change",
    [
        {"total": 1},
        {"total": 1 << 62},
        {"meta": None},
        {"meta": Meta(RecordKind.EPOCH)},
        {"payload": None},
    ],
    ids=str,
)
def test_a_lying_answer_is_a_miss(client: Scripted, change: dict) -> None:
    ticket = client.fetch(frames().keys[0], timeout_s=0.05)
    found = hear(client, msgspec.structs.replace(reply_to(client), **change))
    while not found:
        found = client.poll()
    assert [(c.ticket, c.status) for c in found] == [(ticket, Status.MISS)]
    assert client.stats()["slots_free"] == OPTIONS.slots


@FUZZ
@given(data=st.data())
def test_a_client_survives_anything(data: st.DataObject) -> None:
    case = frames()
    client = Scripted()
    try:
        open_tickets: dict[int, int] = {}
        for _ in range(data.draw(st.integers(1, 8))):
            page = data.draw(st.integers(0, 3))
            if data.draw(st.booleans()):
                client.put(case.keys[page], case.meta, case.frames[page])
                request = wire.decode_request(client.sent[-1]) if client.sent else None
                reply: wire.Reply = wire.Pong(ticket=1)
                if isinstance(request, wire.Put):
                    reply = wire.Stored(ticket=request.ticket, slot=request.payload.slot, accepted=True)
            else:
                open_tickets[client.fetch(case.keys[page], timeout_s=60.0)] = page
                sent = wire.decode_request(client.sent[-1]) if client.sent else None
                fetched = isinstance(sent, wire.Fetch) and sent.key == case.keys[page]
                reply = reply_to(client, page) if fetched else wire.Known(kind=RecordKind.PAGE, keys=case.keys[0])
            message = wire.encode(reply)
            client.inbox.append(data.draw(damaged(message)))
            if data.draw(st.booleans()):
                client.inbox.append(message)
            for completion in client.poll():
                page = open_tickets.pop(completion.ticket)
                if completion.status is Status.OK:
                    assert completion.data == case.frames[page]
        client._drop_outstanding()
        assert {c.ticket for c in client.poll()} == set(open_tickets)
        assert client.stats()["slots_free"] == OPTIONS.slots
    finally:
        client.close()


def test_options_travel_as_json() -> None:
    options = dataclasses.replace(OPTIONS, disk="/somewhere", host_max_error=0.25)
    assert ManagerOptions.from_json(options.to_json()) == options
