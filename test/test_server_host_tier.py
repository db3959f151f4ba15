"""Pages that a small pool evicts wait on the host: prompts come back from there, whatever happens to the manager."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable
from typing import Any

import pytest

import exposition
from answers import Answer
from benchmark.common.text import make_text
from real_server import Server

pytestmark = pytest.mark.server

PROMPTS = {f"prompt-{i}": make_text(500, f"host {i}") for i in range(5)}
WHOLE = 448
"""Tokens of each in whole pages, the last token left out."""
TWO = list(PROMPTS)[:2]


def ask(server: Server, names: Iterable[str] = PROMPTS) -> dict[str, Answer]:
    return {name: server.generate(PROMPTS[name], 4) for name in names}


def host(server: Server) -> dict[str, Any]:
    return server.stats()["host"]


def manager_pid(server: Server, but: int | None = None) -> int:
    """Of the manager that is there, once there is one; not that of `but`."""
    deadline = time.monotonic() + 60
    while True:
        stats = host(server)
        if stats["connected"] and stats["pid"] not in (None, but):
            return stats["pid"]
        assert time.monotonic() < deadline, stats
        time.sleep(0.2)


def metrics(server: Server) -> dict[str, float]:
    """Ours, with the labels of SGLang's own."""
    text = server.exposition()
    return exposition.values(text, exposition.labels_of(text, exposition.SGLANG))


def metrics_like_stats(server: Server) -> dict[str, float]:
    """Our metrics, once they have caught up with the statistics of an idle server, whose manager is the first."""
    deadline = time.monotonic() + 60
    while True:
        shown, expected = metrics(server), exposition.expected(server.stats())
        differing = {name: (shown[name], value) for name, value in expected.items() if abs(shown[name] - value) > 1e-9}
        if not differing:
            return shown
        assert time.monotonic() < deadline, differing
        time.sleep(0.5)


def test_prompts_come_back_and_a_manager_that_dies_costs_hits_only(host_server: Server) -> None:
    server = host_server
    first = manager_pid(server)
    audits = server.stats()["audits"]
    before = ask(server)
    assert host(server)["restored"] == 0
    again = ask(server)
    counters = host(server)
    assert {name: answer.cached_tokens for name, answer in again.items()} == dict.fromkeys(PROMPTS, WHOLE), counters
    # The pool had two of them itself when the second round began, and those have gone before their turn came.
    assert counters["restored"] == 5 * WHOLE // 64 and counters["missed"] == counters["dropped"] == 0, counters
    # What was read uncompressed is compressed now, as it would be without a host tier.
    for name in PROMPTS:
        drift = abs(again[name].logprobs[0] - before[name].logprobs[0])
        assert again[name].tokens[0] == before[name].tokens[0] or before[name].gaps[0] < 0.5, name
        assert again[name].tokens[0] != before[name].tokens[0] or drift < 0.5, (name, drift)

    shown = metrics_like_stats(server)
    assert shown["manager_up"] == 1 and shown["manager_restarts_total"] == 0
    assert shown["host_restored_pages_total"] == counters["restored"]
    # Some came before they had gone to the manager, and a calibration may have come from it, too.
    hits = shown["manager_hits_total{memory}"]
    assert 0 < hits == shown["manager_restore_seconds_count"] and shown["host_bytes{memory}"] > 0

    os.kill(first, signal.SIGKILL)
    second = manager_pid(server, but=first)
    # What the first one had is lost with it.
    after_kill = ask(server, TWO)
    os.kill(second, signal.SIGSTOP)
    after_stop = ask(server, TWO)
    assert all(len(answer.tokens) == 4 for answer in (*after_kill.values(), *after_stop.values()))
    stats = server.wait_for_audit(audits)
    assert stats["host"]["client"]["deaths"] == 1
    shown = metrics(server)
    assert shown["manager_restarts_total"] >= 1
    # A manager counts from 0 on; its figures are added to those of the former one.
    assert shown["manager_hits_total{memory}"] >= hits
    assert shown["manager_stored_records_total"] > stats["host"]["manager"].get("stored", 0)
    assert server.trouble() == []
