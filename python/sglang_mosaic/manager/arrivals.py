"""Pages that leave the server, taken in by a thread of their own: nobody waits for them, and who waits for pages that
come back must not wait for these."""

from __future__ import annotations

import threading
from collections import deque

from sglang_mosaic.manager.service import Service
from sglang_mosaic.wire import messages as wire
from sglang_mosaic.wire.slots import OUT_THREADS

TOGETHER = 2 * OUT_THREADS if OUT_THREADS > 1 else 1
"""Puts taken in at a time."""


class Arrivals:
    """Puts, answered in their order. All methods are for the thread that answers everything else.

    Args:
        service: answers them.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._puts: deque[wire.Put] = deque()
        self._current: list[wire.Put] = []
        self._replies: deque[wire.Reply] = deque()
        self._lock = threading.Lock()
        """Of the puts that wait and the current ones."""
        self._turn = threading.Lock()
        """Of whoever answers some."""
        self._woken = threading.Event()
        self._stopped = False
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="arrivals", daemon=True)

    @property
    def busy(self) -> bool:
        """Whether some were not answered yet, or their answers not taken."""
        with self._lock:
            return bool(self._puts or self._current or self._replies)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End after the puts that are being taken in; idempotent."""
        self._stopped = True
        self._woken.set()
        if self._thread.is_alive():
            self._thread.join()

    def check(self) -> None:
        """Raise what ended the thread, if something has: the process ends with it, and is started again."""
        if self._error is not None:
            raise self._error

    def add(self, put: wire.Put) -> None:
        """Take one in, some time."""
        with self._lock:
            self._puts.append(put)
        self._woken.set()

    def settle(self, request: wire.Request) -> None:
        """Wait until a request that came later has the answer that it would have in its turn."""
        while self._concern(request):
            with self._turn:
                # It may have been one that the other thread had.
                if self._concern(request):
                    self._take_in()

    def replies(self) -> list[wire.Reply]:
        """Answers since this was asked last."""
        replies = []
        while self._replies:
            replies.append(self._replies.popleft())
        return replies

    def _concern(self, request: wire.Request) -> bool:
        if isinstance(request, wire.Ping):
            return False
        with self._lock:
            puts = [*self._puts, *self._current]
        return any(not isinstance(request, wire.Fetch) or put.key == request.key for put in puts)

    def _take_in(self) -> bool:
        """The next ones; False: there is none. Whoever calls has the turn."""
        with self._lock:
            puts = self._current = [self._puts.popleft() for _ in range(min(len(self._puts), TOGETHER))]
        if not puts:
            return False
        try:
            self._replies.extend(self._service.store_all(puts))
        finally:
            with self._lock:
                self._current = []
        return True

    def _run(self) -> None:
        try:
            while not self._stopped:
                with self._turn:
                    found = self._take_in()
                if not found:
                    self._woken.wait()
                    self._woken.clear()
        except Exception as error:
            self._error = error
