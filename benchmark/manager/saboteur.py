"""Kills and stops the manager of a running server."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil

from benchmark.common.errors import BenchmarkError

PATIENCE_S = 120.0
LONGEST_LIFE_S = 4.0
"""Kills come at a random moment of so many seconds after the process appeared: before it is ready, while it is told
what is known, and under load. Every other one comes in a quarter of that."""


def manager_of(server_pid: int) -> psutil.Process | None:
    """The manager's process of a server, if there is one."""
    try:
        for process in psutil.Process(server_pid).children(recursive=True):
            try:
                if "sglang_mosaic.manager" in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                    return process
            except psutil.NoSuchProcess:
                continue
    except psutil.NoSuchProcess:
        pass
    return None


def wait_for(condition: Callable[[], object], what: str, patience_s: float = PATIENCE_S) -> None:
    """
    Raises:
        BenchmarkError: it did not come.
    """
    deadline = time.monotonic() + patience_s
    while not condition():
        if time.monotonic() > deadline:
            raise BenchmarkError(f"{what} did not happen in {patience_s:g} s")
        time.sleep(0.02)


def wait_for_work(server_pid: int, host: Callable[[], dict[str, Any]]) -> None:
    """Wait until the server has a manager that answers, and is not just about to notice that it has ended.

    Args:
        host: tells the server's counters and gauges of its host tier.

    Raises:
        BenchmarkError: it does not get one.
    """

    def works() -> bool:
        manager, stats = manager_of(server_pid), host()
        return manager is not None and stats["connected"] and stats["pid"] == manager.pid

    wait_for(works, "the start of a manager that answers")


def lives(server_pid: int) -> Iterator[psutil.Process]:
    """Every further manager of a server, as it appears."""
    last: int | None = None
    while True:
        found: list[psutil.Process] = []

        def appeared(found: list[psutil.Process] = found, last: int | None = last) -> bool:
            process = manager_of(server_pid)
            if process is not None and process.pid != last:
                found.append(process)
            return bool(found)

        wait_for(appeared, "the start of another manager")
        last = found[0].pid
        yield found[0]


def kill_managers(server_pid: int, kills: int, seed: int, after: Callable[[int], None] = lambda kill: None) -> None:
    """SIGKILL one manager after the other, at random moments.

    Args:
        after: called after every kill, with its number from 1 on.
    """
    rng = random.Random(seed)
    managers = lives(server_pid)
    for kill in range(1, kills + 1):
        manager = next(managers)
        time.sleep(rng.uniform(0.0, LONGEST_LIFE_S / (4 if kill % 2 else 1)))
        manager.kill()
        after(kill)


def stop_manager(server_pid: int, seconds: float) -> bool:
    """SIGSTOP the manager for a while; whether it lives on."""
    manager = next(lives(server_pid))
    manager.send_signal(signal.SIGSTOP)
    time.sleep(seconds)
    try:
        manager.send_signal(signal.SIGCONT)
        return manager.is_running() and manager.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
