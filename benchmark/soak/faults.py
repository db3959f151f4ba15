"""The faults of a soak: how each is made, and what came of it."""

from __future__ import annotations

import resource
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import requests

from benchmark.common.errors import BenchmarkError
from benchmark.common.sglang_http import generate_body
from benchmark.manager.own_server import statistics
from benchmark.manager.saboteur import manager_of, wait_for, wait_for_work

PAUSE_MS = 30
"""Longest pause that jitter makes."""
FULL_DISK_BYTES = 4096
"""Files of the manager may not grow beyond it while its disk is full: every record is larger."""
FULL_DISK_S = 60.0
"""Longest wait for a write that is refused."""
STOP_S = 6.0
"""Twice the silence after which a manager counts as dead."""
JITTER_S = 20.0
SLOW_READER_S = 8.0
RUDE_BODIES: dict[str, Any] = {
    "no JSON": "{",
    "no prompt": {},
    "a prompt longer than the context": {"input_ids": [1000] * 100_000, "sampling_params": {"max_new_tokens": 1}},
    "a temperature below zero": {"text": "a", "sampling_params": {"temperature": -1}},
    "no room for the answer": {"input_ids": [1000] * 100, "sampling_params": {"max_new_tokens": -5}},
}
"""Requests that must be refused with a status from 400 to 499. Not among them: token ids beyond the vocabulary, which
SGLang 0.5.17 does not check and the model's embedding does not survive, whoever serves."""


class Faults:
    """Makes faults in a server, and keeps count of their outcomes.

    Args:
        url: of the server.
        pid: of its first process.
        jitter: the file that its jitter plugin looks at.
    """

    def __init__(self, url: str, pid: int, jitter: Path) -> None:
        self._url = url
        self._pid = pid
        self._jitter = jitter
        self.outcomes: dict[str, Counter[str]] = {}
        self.wrong: list[str] = []
        self.kinds: dict[str, Callable[[], str]] = {
            "manager killed (SIGKILL)": self._kill_manager,
            f"manager stopped (SIGSTOP) for {STOP_S:g} s": self._stop_manager,
            "disk full": self._fill_disk,
            f"pauses up to {PAUSE_MS} ms after publications and copies, for {JITTER_S:g} s": self._pause,
            "flush_cache under load": self._flush,
            "requests that must be refused": self._rude,
            f"a client that does not read for {SLOW_READER_S:g} s": self._slow_reader,
        }

    def make(self, kind: str) -> str:
        """Make one; its outcome.

        Raises:
            BenchmarkError: the server did not come out of it.
        """
        outcome = self.kinds[kind]()
        self.outcomes.setdefault(kind, Counter())[outcome] += 1
        return outcome

    def _manager(self) -> psutil.Process:
        wait_for_work(self._pid, lambda: statistics(self._url)["host"])
        manager = manager_of(self._pid)
        if manager is None:
            raise BenchmarkError("the manager has just ended by itself")
        return manager

    def _kill_manager(self) -> str:
        manager = self._manager()
        manager.kill()
        wait_for(lambda: (now := manager_of(self._pid)) is not None and now.pid != manager.pid, "another manager")
        self._manager()
        return "replaced"

    def _stop_manager(self) -> str:
        manager = self._manager()
        manager.suspend()
        try:
            time.sleep(STOP_S)
        finally:
            manager.resume()
        return "went on" if self._manager().pid == manager.pid else "replaced"

    def _fill_disk(self) -> str:
        """No file may grow: writing fails as on a full disk, with another error number."""
        manager = self._manager()
        before = self._refused_writes()
        _, hard = manager.rlimit(psutil.RLIMIT_FSIZE)
        manager.rlimit(psutil.RLIMIT_FSIZE, (FULL_DISK_BYTES, hard))
        try:
            until = time.monotonic() + FULL_DISK_S
            while self._refused_writes() <= before and time.monotonic() < until:
                time.sleep(1.0)
        finally:
            manager.rlimit(psutil.RLIMIT_FSIZE, (resource.RLIM_INFINITY, hard))
        if self._manager().pid != manager.pid:
            return "the manager ended"
        return "writes refused and counted" if self._refused_writes() > before else "nothing was to be written"

    def _refused_writes(self) -> int:
        return statistics(self._url)["host"]["manager"].get("refused_writes", 0)

    def _pause(self) -> str:
        with pauses(self._jitter):
            time.sleep(JITTER_S)
        return "went on"

    def _flush(self) -> str:
        response = requests.post(f"{self._url}/flush_cache", timeout=120)
        if response.ok:
            return "emptied"
        if response.status_code >= 500:
            self.wrong.append(f"flush_cache answered HTTP {response.status_code}")
        return f"refused, HTTP {response.status_code}"

    def _rude(self) -> str:
        refused = 0
        for name, body in RUDE_BODIES.items():
            sent = {"data": body} if isinstance(body, str) else {"json": body}
            response = requests.post(f"{self._url}/generate", timeout=120, **sent)
            if 400 <= response.status_code < 500:
                refused += 1
            else:
                self.wrong.append(f"{name}: HTTP {response.status_code} {response.text[:100]}")
        return f"{refused} of {len(RUDE_BODIES)} refused"

    def _slow_reader(self) -> str:
        """Streams an answer into a socket with next to no buffer and does not look at it, then goes."""
        host, _, port = self._url.removeprefix("http://").partition(":")
        body = requests.Request("POST", f"{self._url}/generate", json=generate_body("slow", 60, stream=True)).prepare()
        head = "".join(f"{name}: {value}\r\n" for name, value in body.headers.items())
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            client.connect((host, int(port)))
            client.sendall(f"POST /generate HTTP/1.1\r\nHost: {host}\r\n{head}\r\n".encode() + body.body)
            time.sleep(SLOW_READER_S)
        return "went away"


@contextmanager
def pauses(file: Path, longest_ms: float = PAUSE_MS) -> Iterator[None]:
    """Have a server with the jitter plugin pause meanwhile.

    Args:
        file: that it looks at.
    """
    # It appears whole: the server reads it at any time.
    before = file.with_suffix(".tmp")
    before.write_text(str(longest_ms))
    before.rename(file)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
