"""The manager's loop: one thread answers, one takes pages in (arrivals.py), one works in the background."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections import deque
from pathlib import Path

import zmq

from sglang_mosaic.manager.arrivals import Arrivals
from sglang_mosaic.manager.child import has_parent
from sglang_mosaic.manager.options import ManagerOptions
from sglang_mosaic.manager.reserve import Reserve
from sglang_mosaic.manager.service import Service
from sglang_mosaic.wire import messages as wire
from sglang_mosaic.wire.slots import BACK_THREADS, SlotMemory

QUIET_MS, BUSY_MS = 200, 10
"""How long the loop sleeps without a message, and while something in the background may end."""
MOST_WAITING = 256
"""Replies that the owner has no room for, beyond which it is not listened to any more."""
FETCHES_TOGETHER = 2 * BACK_THREADS if BACK_THREADS > 1 else 1
"""Answered at a time."""
SWITCH_S = 0.0005
"""How long the background thread may keep the interpreter while the other one has something to answer."""


def serve(parent: int, socket: Path, slots: SlotMemory, options: ManagerOptions) -> None:
    """Answer the owner until it says goodbye or dies.

    Args:
        parent: process id of the owner.
        socket: where to listen.
        slots: the owner's shared memory.
        options: limits.
    """
    sys.setswitchinterval(SWITCH_S)
    # The owner's terminal sends it to both; the owner says goodbye.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    service = Service(slots, options)
    arrivals = Arrivals(service)
    background = _Background(service, Reserve(options.host_bytes))
    context = zmq.Context()
    try:
        with context.socket(zmq.ROUTER) as router:
            router.setsockopt(zmq.LINGER, 0)
            router.setsockopt(zmq.ROUTER_MANDATORY, 1)
            router.setsockopt(zmq.MAXMSGSIZE, wire.MOST_BYTES)
            router.bind(f"ipc://{socket}")
            background.start()
            arrivals.start()
            _Loop(parent, router, service, arrivals, background).run()
        background.stop()
        deadline = time.monotonic() + options.close_s * 0.8
        while time.monotonic() < deadline and service.work(flush=True):
            pass
    finally:
        arrivals.stop()
        background.stop()
        service.close()
        context.term()


class _Loop:
    def __init__(
        self, parent: int, router: zmq.Socket[bytes], service: Service, arrivals: Arrivals, background: _Background
    ) -> None:
        self._parent = parent
        self._router = router
        self._service = service
        self._arrivals = arrivals
        self._background = background
        self._owner: bytes | None = None
        self._fetches: list[wire.Fetch] = []
        """That came one after another and were not answered yet."""
        self._replies: deque[bytes] = deque()

    def run(self) -> None:
        while not self._service.leaving and has_parent(self._parent):
            self._arrivals.check()
            self._background.check()
            busy = bool(self._replies) or self._arrivals.busy or self._service.busy
            self._router.poll(BUSY_MS if busy else QUIET_MS)
            # All messages before anything else: a restore must not wait behind a report.
            while len(self._replies) < MOST_WAITING and self._take():
                self._flush()
            self._bring()
            self._say([*self._service.collect(), *self._arrivals.replies()])
            self._flush()

    def _take(self) -> bool:
        try:
            sender, *parts = self._router.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return False
        if self._owner is None:
            self._owner = sender
            self._say(self._service.hello())
        if sender != self._owner or len(parts) != 1:
            self._service.metrics.refused_messages += 1
            return True
        request = self._service.receive(parts[0])
        if isinstance(request, wire.Fetch):
            self._fetches.append(request)
            if len(self._fetches) == FETCHES_TOGETHER:
                self._bring()
        elif isinstance(request, wire.Put):
            self._arrivals.add(request)
        elif request is not None:
            self._bring()
            self._arrivals.settle(request)
            self._say([*self._arrivals.replies(), *self._service.answer(request)])
        self._background.wake()
        return not self._service.leaving

    def _bring(self) -> None:
        """Answer the fetches that have come."""
        fetches, self._fetches = self._fetches, []
        for fetch in fetches:
            self._arrivals.settle(fetch)
        if fetches:
            self._say([*self._arrivals.replies(), *self._service.fetch_all(fetches)])

    def _say(self, replies: list[wire.Reply]) -> None:
        self._replies.extend(wire.encode(reply) for reply in replies)

    def _flush(self) -> None:
        """Send as much as the owner has room for; the rest waits."""
        while self._replies and self._owner is not None:
            try:
                self._router.send_multipart([self._owner, self._replies[0]], zmq.NOBLOCK)
            except zmq.Again:
                return
            except zmq.ZMQError:
                # The owner's socket is gone, and with it whoever could use an answer.
                self._replies.clear()
                return
            self._replies.popleft()


class _Background:
    """The thread of lower standing."""

    def __init__(self, service: Service, reserve: Reserve) -> None:
        self._service = service
        self._reserve = reserve
        self._woken = threading.Event()
        self._stopped = False
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="background", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """There may be something to do."""
        self._woken.set()

    def check(self) -> None:
        """Raise what ended the thread, if something has: the process ends with it, and is started again."""
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """End after the step that runs; idempotent."""
        self._stopped = True
        self._woken.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        try:
            while not self._stopped:
                if not (self._service.work() or self._reserve.keep_ahead(self._service.store.memory.nbytes)):
                    self._woken.wait(QUIET_MS / 1000)
                    self._woken.clear()
        except Exception as error:
            self._error = error
