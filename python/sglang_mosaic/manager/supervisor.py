"""Starts the manager's process, notices its end, and starts it again after ever longer pauses."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from pathlib import Path

from sglang_mosaic.manager.child import allocator_options, thread_limits
from sglang_mosaic.manager.options import ManagerOptions
from sglang_mosaic.wire.slots import SlotMemory

logger = logging.getLogger(__name__)

STABLE_S = 60.0
"""Life of a manager after which the next pause is the first one again."""


class Supervisor:
    """At most one process at a time. Nothing here waits for it but `end`.

    Args:
        options: for the managers, and the pauses.
    """

    def __init__(self, options: ManagerOptions) -> None:
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None
        self._started = 0.0
        self._pause = options.backoff_s
        self._next_start = 0.0

    @property
    def pid(self) -> int | None:
        """Of the process, if there is one."""
        return None if self._process is None else self._process.pid

    @property
    def due(self) -> bool:
        """Whether there is no process, and the pause is over."""
        return self._process is None and time.monotonic() >= self._next_start

    def start(self, socket: Path, slots: SlotMemory) -> None:
        """Start a process that listens there. Takes about a millisecond; it is ready when it says so.

        Raises:
            OSError: the system refuses.
        """
        command = [sys.executable, "-m", "sglang_mosaic.manager", str(os.getpid()), str(socket), str(slots.fd)]
        self._process = subprocess.Popen(
            [*command, self._options.to_json()],
            pass_fds=(slots.fd,),
            stdin=subprocess.DEVNULL,
            env={**os.environ, **thread_limits(1), **allocator_options()},
        )
        self._started = time.monotonic()

    def not_started(self, error: OSError) -> None:
        """The system refused a process or its memory; begins the pause."""
        self._started = time.monotonic()
        self._lost(f"could not be started ({error})")

    def ended(self) -> bool:
        """Whether the process has ended since it was asked last; says so in the log, and begins the pause."""
        if self._process is None or self._process.poll() is None:
            return False
        self._lost(f"ended with status {self._process.returncode}")
        return True

    def kill(self, reason: str) -> None:
        """End a process that does not do its work, stopped ones too; begins the pause."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._lost(reason)

    def end(self, wait_s: float) -> None:
        """Wait for a process that was told to end, then end it."""
        if self._process is not None:
            try:
                self._process.wait(wait_s)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None

    def _lost(self, reason: str) -> None:
        now = time.monotonic()
        if now - self._started > STABLE_S:
            self._pause = self._options.backoff_s
        logger.warning(
            "The mosaic manager (process %s) %s. Evicted pages are recomputed until the next one is ready; it starts "
            "in %.1f s.",
            self.pid,
            reason,
            self._pause,
        )
        self._process = None
        self._next_start = now + self._pause
        self._pause = min(self._pause * 2, self._options.most_backoff_s)
