"""The manager inside its own server: the same logic without a process, for tests and tools. Every `poll` does one step
of the manager's background work itself, so it is not for serving.
"""

from __future__ import annotations

from collections import deque

from sglang_mosaic.manager.client import Completion
from sglang_mosaic.manager.options import ManagerOptions
from sglang_mosaic.manager.service import Service
from sglang_mosaic.manager.slotted_client import SlottedClient
from sglang_mosaic.wire import messages as wire


class InProcessClient(SlottedClient):
    """
    Args:
        options: sizes and limits.
    """

    def __init__(self, options: ManagerOptions) -> None:
        super().__init__(options)
        self._service: Service | None = Service(self._memory, options)
        self._replies: deque[bytes] = deque()
        self._reply(self._service.hello())
        while self._replies:
            self._take(wire.decode_reply(self._replies.popleft()))

    @property
    def connected(self) -> bool:
        return self._service is not None

    def poll(self) -> list[Completion]:
        if self._service is not None:
            self._service.work()
            self._reply(self._service.collect())
            self._post(wire.Ping(ticket=next(self._numbers)))
        return super().poll()

    def close(self) -> None:
        if self._service is not None:
            self._send_writes(all_=True)
            while self._service.work(flush=True):
                pass
            self._service.close()
            self._service = None
            self._drop_outstanding()
            self._end_threads()
            self._memory.close()

    def _send(self, data: bytes) -> bool:
        if self._service is None:
            return False
        self._reply(self._service.handle(data))
        return True

    def _receive(self) -> bytes | None:
        return self._replies.popleft() if self._replies else None

    def _reply(self, replies: list[wire.Reply]) -> None:
        self._replies.extend(wire.encode(reply) for reply in replies)
