"""A real server process: start, wait until healthy, and end together with every process it spawned."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO

import psutil
import requests

from benchmark.common.errors import BenchmarkError

LOG_TAIL_LINES = 25
SERVER_PORTS = range(20_000, 30_000)
"""Below those that Linux gives to connections: one of them may be gone by the time that a server has started."""


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that was free a moment ago, and that the system gives to no connection while a server starts."""
    # Not of a seed, which other processes may have, too.
    for port in random.SystemRandom().sample(SERVER_PORTS, 100):
        with socket.socket() as probe:
            try:
                probe.bind((host, port))
            except OSError:
                continue
            return port
    raise BenchmarkError(f"of 100 ports of {host} between {SERVER_PORTS[0]} and {SERVER_PORTS[-1]} none is free")


class ServerProcess:
    """Context manager around one server. Entering returns once /health answers 200; leaving ends the process tree.

    The server gets its own session, so that an interrupt of the benchmark reaches it only through `stop`. SIGTERM to
    the benchmark is turned into SystemExit while a server runs: otherwise the server would outlive it.
    """

    def __init__(self, argv: list[str], url: str, log_path: Path, health_timeout_s: float = 900.0) -> None:
        self.argv = argv
        self.url = url
        self.log_path = log_path
        self._health_timeout_s = health_timeout_s
        self._log: IO[bytes] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._old_sigterm: object = None

    def __enter__(self) -> ServerProcess:
        self.start()
        try:
            self.wait_healthy()
        except BaseException:
            self.stop()
            raise
        return self

    @property
    def pid(self) -> int:
        """Process id of the server's first process; BenchmarkError if it has ended."""
        self.check_alive()
        return self._process.pid

    def kill(self) -> None:
        """SIGKILL to every process of the tree at once, as a machine's end would come; `stop` is still to be called."""
        tree = _tree(self.pid)
        _signal_each(tree, signal.SIGKILL)
        psutil.wait_procs(tree, timeout=60)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Spawn the process; its output goes to `log_path`."""
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        if threading.current_thread() is threading.main_thread():
            self._old_sigterm = signal.signal(signal.SIGTERM, _exit_on_signal)
        self._log = self.log_path.open("wb")
        self._process = subprocess.Popen(
            self.argv,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def wait_healthy(self) -> None:
        """Poll /health until it answers 200; BenchmarkError with the end of the log if the server dies or is late."""
        deadline = time.monotonic() + self._health_timeout_s
        while time.monotonic() < deadline:
            self.check_alive()
            try:
                if requests.get(f"{self.url}/health", timeout=30).status_code == 200:
                    return
            except requests.RequestException:
                pass
            time.sleep(0.5)
        raise BenchmarkError(
            f"the server was not healthy after {self._health_timeout_s:.0f} s (--health-timeout raises that)\n"
            f"{self._log_tail()}"
        )

    def check_alive(self) -> None:
        """BenchmarkError with the end of the log if the process has ended."""
        if self._process is None or self._process.poll() is not None:
            code = None if self._process is None else self._process.returncode
            raise BenchmarkError(f"the server ended with exit status {code}\n{self._log_tail()}")

    def stop(self, grace_s: float = 15.0) -> None:
        """End the whole tree: SIGTERM, then SIGKILL for what is left after `grace_s`. Safe to call twice."""
        process, self._process = self._process, None
        if process is not None:
            tree = _tree(process.pid)
            _signal_each(tree, signal.SIGTERM)
            _, alive = psutil.wait_procs(tree, timeout=grace_s)
            # Children that the tree spawned meanwhile are still in the group of the session that was started.
            _signal_each(alive, signal.SIGKILL)
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            psutil.wait_procs(alive, timeout=grace_s)
            process.wait()
        if self._log is not None:
            self._log.close()
            self._log = None
        if self._old_sigterm is not None:
            signal.signal(signal.SIGTERM, self._old_sigterm)  # type: ignore[arg-type]
            self._old_sigterm = None

    def _log_tail(self) -> str:
        lines = self.log_path.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
        return "\n".join([f"end of {self.log_path}:", *lines])


def _exit_on_signal(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)


def _tree(pid: int) -> list[psutil.Process]:
    """The process and all its descendants, children last; empty when it is gone."""
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _signal_each(processes: list[psutil.Process], signum: int) -> None:
    for process in processes:
        try:
            process.send_signal(signum)
        except psutil.NoSuchProcess:
            pass
