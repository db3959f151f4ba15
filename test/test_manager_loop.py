"""What the manager answers first."""

from __future__ import annotations

import os
import threading
from collections import deque

import msgspec
import pytest
import zmq

from manager_cases import frames, waves
from sglang_mosaic.manager import arrivals as arrivals_module
from sglang_mosaic.manager import process as process_module
from sglang_mosaic.manager import service as service_module
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


def use_threads(monkeypatch: pytest.MonkeyPatch, threads: int, together: int) -> None:
    """As on a machine with so many cores that so many threads copy, and so many requests are answered at a time."""
    for name in ("BACK_THREADS", "OUT_THREADS"):
        monkeypatch.setattr(service_module, name, threads)
    monkeypatch.setattr(process_module, "FETCHES_TOGETHER", together)
    monkeypatch.setattr(arrivals_module, "TOGETHER", together)


def test_a_page_that_somebody_waits_for_comes_before_those_that_go(monkeypatch: pytest.MonkeyPatch) -> None:
    use_threads(monkeypatch, 1, 1)
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


def test_several_threads_answer_as_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each request by itself, in order: pages, a damaged payload, misses, a slot that is not there, a page in parts."""
    case, pages = frames(), 6
    nbytes = len(case.frames[0])

    def answers(threads: int, together: int) -> list[wire.Reply]:
        use_threads(monkeypatch, threads, together)
        options = ManagerOptions(slot_bytes=nbytes, slots=3 * pages)
        memory = SlotMemory.create(options.slots, options.slot_bytes)
        requests: list[wire.Request] = []
        for i in range(pages):
            payload = memory.write(Slot(i, 1), case.keys[i], case.frames[i])
            if i == 2:
                payload = msgspec.structs.replace(payload, checksum=payload.checksum ^ 1)
            requests.append(wire.Put(ticket=1 + i, key=case.keys[i], meta=case.meta, payload=payload, total=nbytes))
        asked = [0, 1, 2, 3, 7, 4, 5, 0]
        for n, page in enumerate(asked):
            slot = Slot(9 + n if n != 3 else 999, 1)
            offset = 64 if n == 7 else 0
            fetch = wire.Fetch(
                ticket=20 + n, kind=RecordKind.PAGE, key=case.keys[page], slot=slot, deadline=1e12, offset=offset
            )
            requests.append(fetch)
        router = Router([*requests, wire.Ping(ticket=40), wire.Goodbye(ticket=41)])
        service = Service(memory, options)
        _Loop(os.getppid(), router, service, Arrivals(service), Idle()).run()
        service.close()
        fetched = [reply for reply in router.replies if isinstance(reply, wire.Fetched)]
        for reply, page in zip(fetched, asked, strict=True):
            if reply.payload is not None:
                offset = 64 if reply.ticket == 27 else 0
                assert memory.read(reply.payload, reply.key) == case.frames[page][offset:]
        memory.close()
        metrics = service.metrics
        assert (metrics.fetches, metrics.hits_memory, metrics.misses) == (8, 5, 2)
        assert (metrics.refused_payloads, metrics.refused_messages) == (1, 1)
        stored = sorted((r for r in router.replies if isinstance(r, wire.Stored)), key=lambda reply: reply.ticket)
        return [*stored, *(msgspec.structs.replace(reply, answered=0.0) for reply in fetched)]

    wanted = answers(1, 1)
    assert [reply.ticket for reply in wanted] == [*range(1, 7), *range(20, 28)]
    assert [reply.accepted for reply in wanted[:6]] == [True, True, False, True, True, True]
    assert [reply.payload is not None for reply in wanted[6:]] == [True, True, False, False, False, True, True, True]
    assert answers(3, 4) == wanted


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
