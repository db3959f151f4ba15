"""What the manager answers first."""

from __future__ import annotations

import os
from collections import deque

import zmq

from manager_cases import frames
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
