"""What the manager answers first."""

from __future__ import annotations

import os
import threading
from collections import deque

import pytest
import zmq

from manager_cases import frames, waves
from sglang_mosaic.manager.arrivals import Arrivals
from sglang_mosaic.manager.options import ManagerOptions
from sglang_mosaic.manager.process import _Loop
from sglang_mosaic.manager.service import Service
from sglang_mosaic.wire import messages as wire
from sglang_mosaic.wire.messages import RecordKind, Slot
from sglang_mosaic.wire.slots import SlotMemory


class Router:
    """A socket at which all messages lie already."""

    def __init__(self, requests: list[wire.Request]) -> None:
        self._messages = deque(wire.encode(request) for request in requests)
        self.replies: list[wire.Reply] = []

    def poll(self, _: int) -> None: ...

    def recv_multipart(self, _: int) -> list[bytes]:
        if not self._messages:
            raise zmq.Again
        return [b"owner", self._messages.popleft()]

    def send_multipart(self, parts: list[bytes], _: int) -> None:
        self.replies.append(wire.decode_reply(parts[1]))


class Idle:
    """A background thread with nothing to do."""

    def check(self) -> None: ...

    def wake(self) -> None: ...


def test_a_page_that_somebody_waits_for_comes_before_those_that_go() -> None:
    case, slots = frames(), 6
    options = ManagerOptions(slot_bytes=len(case.frames[0]), slots=slots)
    memory = SlotMemory.create(slots, options.slot_bytes)

    def put(ticket: int, page: int) -> wire.Put:
        payload = memory.write(Slot(page, 1), case.keys[page], case.frames[page])
        return wire.Put(ticket=ticket, key=case.keys[page], meta=case.meta, payload=payload, total=payload.length)

    def fetch(ticket: int, key: bytes, slot: int) -> wire.Fetch:
        slot_ = Slot(slot, 1)
        return wire.Fetch(ticket=ticket, kind=RecordKind.PAGE, key=key, slot=slot_, deadline=float("inf"), offset=0)

    unknown = bytes(len(case.keys[0]))
    requests = [put(1, 0), put(2, 1), put(3, 2), fetch(4, unknown, 3), wire.Ping(ticket=5), fetch(6, case.keys[1], 4)]
    router = Router([*requests, wire.Goodbye(ticket=7)])
    service = Service(memory, options)
    # Its thread does not run: nothing is taken in but what somebody waits for.
    _Loop(os.getppid(), router, service, Arrivals(service), Idle()).run()
    answers = [(type(reply), reply.ticket) for reply in router.replies if isinstance(reply, wire.Fetched | wire.Stored)]
    # What asks for a page that is on its way waits for it; nothing is lost at the end.
    assert answers == [(wire.Fetched, 4), (wire.Stored, 1), (wire.Stored, 2), (wire.Fetched, 6), (wire.Stored, 3)]
    (found,) = (reply for reply in router.replies if isinstance(reply, wire.Fetched) and reply.ticket == 6)
    assert memory.read(found.payload, found.key) == case.frames[1]
    memory.close()


class SlowService:
    """Answers puts when it is told to, in the place of one that copies and checks pages."""

    def __init__(self) -> None:
        self.began, self.goes_on = threading.Event(), threading.Event()
        self.answered: list[int] = []

    def store_all(self, puts: list[wire.Put]) -> list[wire.Reply]:
        self.began.set()
        self.goes_on.wait(20)
        if any(put.ticket == 13 for put in puts):
            raise RuntimeError("thirteen")
        self.answered += [put.ticket for put in puts]
        return [wire.Stored(ticket=put.ticket, slot=put.payload.slot, accepted=True) for put in puts]


def put_of(ticket: int) -> wire.Put:
    case = frames()
    payload = wire.Payload(Slot(0, 1), 64, 0)
    return wire.Put(ticket=ticket, key=case.keys[ticket], meta=case.meta, payload=payload, total=64)


def fetch_of(ticket: int) -> wire.Fetch:
    key = frames().keys[ticket]
    return wire.Fetch(ticket=90, kind=RecordKind.PAGE, key=key, slot=Slot(1, 1), deadline=float("inf"), offset=0)


def test_who_asks_for_the_page_that_is_being_taken_in_waits_for_it_alone() -> None:
    service = SlowService()
    arrivals = Arrivals(service)
    arrivals.start()
    try:
        for ticket in (1, 2):
            arrivals.add(put_of(ticket))
        assert service.began.wait(20)
        arrivals.settle(fetch_of(5))  # returns, though nothing goes on
        arrivals.settle(wire.Ping(ticket=91))
        asking = threading.Thread(target=arrivals.settle, args=(fetch_of(1),))
        asking.start()
        asking.join(0.1)
        assert asking.is_alive() and arrivals.busy and service.answered == []
        service.goes_on.set()
        asking.join(20)
        assert not asking.is_alive() and service.answered[0] == 1
        for _ in waves():
            if len(service.answered) == 2:
                break
        assert [reply.ticket for reply in arrivals.replies()] == [1, 2]
        assert not arrivals.busy
    finally:
        service.goes_on.set()
        arrivals.stop()


def test_what_ends_the_thread_that_takes_pages_in_ends_the_manager() -> None:
    service = SlowService()
    service.goes_on.set()
    arrivals = Arrivals(service)
    arrivals.start()
    arrivals.check()
    arrivals.add(put_of(13))
    with pytest.raises(RuntimeError, match="thirteen"):
        for _ in waves():
            arrivals.check()
    arrivals.stop()
