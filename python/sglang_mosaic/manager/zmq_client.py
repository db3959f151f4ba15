"""The manager as a process of its own, over ZMQ: a DEALER here, a ROUTER there, in a private directory."""

from __future__ import annotations

import enum
import itertools
import shutil
import time
import weakref

import zmq

from sglang_mosaic.manager import ipc_directory
from sglang_mosaic.manager.client import Completion
from sglang_mosaic.manager.options import ManagerOptions
from sglang_mosaic.manager.slotted_client import SlottedClient
from sglang_mosaic.manager.supervisor import Supervisor
from sglang_mosaic.wire import messages as wire
from sglang_mosaic.wire.buffers import Allocate, usual_memory
from sglang_mosaic.wire.slots import SlotMemory

SPARE_MESSAGES = 64
"""Messages that may wait on a socket besides one per slot."""


class Link(enum.Enum):
    """What this side thinks of the manager."""

    DOWN = "down"
    """There is none; the next one starts after a pause."""
    STARTING = "starting"
    UP = "up"
    SILENT = "silent"
    """It does not answer: as good as dead, unless it speaks again."""


class ZmqClient(SlottedClient):
    """Every manager gets a socket, slots and knowledge of its own: what a former one still does reaches nobody.

    The process is started by the first `poll` and restarted by later ones, and dies with this process. Call `close`.

    Args:
        options: sizes, limits and times.
        allocate: as of `SlottedClient`.

    Raises:
        ConfigError: there is no place for sockets.
    """

    def __init__(self, options: ManagerOptions, allocate: Allocate = usual_memory) -> None:
        super().__init__(options, allocate)
        self.link = Link.DOWN
        self._directory = ipc_directory.make()
        # For programs that end without `close`; the next start sweeps what a killed one leaves.
        self._remove_directory = weakref.finalize(self, shutil.rmtree, self._directory, ignore_errors=True)
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] | None = None
        self._supervisor = Supervisor(options)
        self._lives = itertools.count()
        self._started = 0.0
        self._last_ping = 0.0
        self._asked: float | None = None
        """When the oldest ping was sent that is not answered yet."""
        self._closed = False

    @property
    def connected(self) -> bool:
        return self.link is Link.UP

    @property
    def manager_pid(self) -> int | None:
        """Process id of the manager, if there is one."""
        return self._supervisor.pid

    def poll(self) -> list[Completion]:
        if not self._closed:
            if self._supervisor.ended():
                self._lost()
            elif self._supervisor.due:
                try:
                    self._start()
                except OSError as error:
                    self._supervisor.not_started(error)
                    self._lost()
        # What arrived is looked at before anybody is called silent: it may be this side that slept.
        completions = super().poll()
        if not self._closed and self._supervisor.pid is not None:
            self._watch(time.monotonic())
        return completions

    def stats(self) -> dict[str, object]:
        return {**super().stats(), "link": self.link.value, "pid": self.manager_pid}

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._send_writes(all_=True)
        if self.link is Link.UP and self._post(wire.Goodbye(ticket=next(self._numbers))):
            self._supervisor.end(self.options.close_s)
        self._supervisor.end(0)
        self._drop_outstanding()
        self.link = Link.DOWN
        self._end_threads()
        self._disconnect()
        self._context.term()
        self._memory.close()
        self._remove_directory()

    def _start(self) -> None:
        self._memory.close()
        self._begin(SlotMemory.create(self.options.slots, self.options.slot_bytes))
        path = ipc_directory.socket(self._directory, next(self._lives))
        self._supervisor.start(path, self._memory)
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, wire.MOST_BYTES)
        self._socket.setsockopt(zmq.SNDHWM, self.options.slots + SPARE_MESSAGES)
        # The socket appears once the manager listens.
        self._socket.setsockopt(zmq.RECONNECT_IVL, 20)
        self._socket.connect(f"ipc://{path}")
        self.link = Link.STARTING
        self._started = time.monotonic()
        # The manager greets whoever speaks to it.
        self._ping(self._started)

    def _watch(self, now: float) -> None:
        options = self.options
        if self.link is Link.STARTING:
            if now - self._started > options.ready_s:
                self._supervisor.kill(f"was not ready after {options.ready_s:g} s and was killed")
                self._lost()
            return
        silent = 0.0 if self._asked is None else now - self._asked
        if silent > options.kill_s:
            self._supervisor.kill(f"did not answer for {options.kill_s:g} s and was killed")
            self._lost()
        elif silent > options.silence_s and self.link is Link.UP:
            self.link = Link.SILENT
            self.counters.silences += 1
            self._drop_outstanding()
        elif now - self._last_ping > options.heartbeat_s:
            self._ping(now)

    def _ping(self, now: float) -> None:
        self._last_ping = now
        if self._send(wire.encode(wire.Ping(ticket=next(self._numbers)))) and self._asked is None:
            self._asked = now

    def _take(self, reply: wire.Reply) -> None:
        self._asked = None
        if isinstance(reply, wire.Ready) or self.link is Link.SILENT:
            self.link = Link.UP
            self._ready()
        super()._take(reply)

    def _lost(self) -> None:
        self.counters.deaths += 1
        self.link = Link.DOWN
        self._asked = None
        # What it had is gone, and what it counted must not be taken for its successor's.
        self._metrics = {}
        self._disconnect()
        self._drop_outstanding()

    def _disconnect(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _send(self, data: bytes) -> bool:
        if self._socket is None:
            return False
        try:
            self._socket.send(data, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def _receive(self) -> bytes | None:
        if self._socket is None:
            return None
        try:
            return self._socket.recv(zmq.NOBLOCK)
        except zmq.Again:
            return None
