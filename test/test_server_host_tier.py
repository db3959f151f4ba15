"""Pages that a small pool evicts wait on the host: prompts come back from there, whatever happens to the manager."""

from __future__ import annotations

import os
import signal
import time

import pytest

from answers import Answer
from benchmark.common.text import make_text
from real_server import Server

pytestmark = pytest.mark.server

PROMPTS = {f"prompt-{i}": make_text(500, f"host {i}") for i in range(9)}
"""4,500 tokens in a pool of 4,096, where some pages are of running requests."""


def ask_all(server: Server) -> dict[str, Answer]:
    return {name: server.generate(prompt, 4) for name, prompt in PROMPTS.items()}


def host(server: Server) -> dict:
    return server.stats()["host"]


def manager_pid(server: Server) -> int:
    """Of the live manager; waits for it."""
    deadline = time.monotonic() + 60
    while True:
        stats = host(server)
        if stats["connected"] and stats["pid"]:
            return stats["pid"]
        assert time.monotonic() < deadline, stats
        time.sleep(0.2)


def test_evicted_prompts_come_back_and_a_dead_manager_costs_hits_only(pressure_server: Server) -> None:
    server = pressure_server
    server.flush()
    audits = server.stats()["audits"]
    first_pid = manager_pid(server)
    before = ask_all(server)
    restored = host(server)["restored"]
    again = ask_all(server)
    came_back = host(server)["restored"] - restored
    # Nine prompts of seven whole pages; the pool holds some of them itself, and least recently used ones go first.
    assert came_back >= 9, host(server)
    assert sum(answer.cached_tokens for answer in again.values()) >= 9 * 5 * 64
    # What was written dense and comes back compressed differs by the codec's error, which sure tokens survive.
    close = [name for name in PROMPTS if again[name].tokens[0] == before[name].tokens[0]]
    assert len(close) >= 7, f"only {close} begin with the same token"

    os.kill(first_pid, signal.SIGKILL)
    after = ask_all(server)
    assert manager_pid(server) != first_pid
    assert len(after) == len(PROMPTS)
    os.kill(manager_pid(server), signal.SIGSTOP)
    ask_all(server)
    stats = server.wait_for_audit(audits)
    assert stats["host"]["client"]["deaths"] >= 1
    assert server.trouble() == []
