"""Prompts that do not fit together, from several clients, while the server is held up, and its manager killed and
stopped: the tokens of a server that was left alone."""

from __future__ import annotations

import psutil
import pytest

from benchmark.common.leftovers import shared_memory_files
from benchmark.manager.fault_load import Expected, Load, answers, shared_prefix_prompts
from benchmark.manager.saboteur import kill_managers, manager_of, stop_manager, wait_for, wait_for_work
from benchmark.soak.faults import pauses
from real_server import Server, Servers

pytestmark = pytest.mark.server

PROMPTS = shared_prefix_prompts(families=4, members=2, shared_tokens=250, own_tokens=60)
"""About 2,000 tokens in all, those that are shared counted once."""
TOKENS = 6
CLIENTS = 3
KILLS = 4
STOP_S = 10.0
"""Longer than a silent manager is taken for alive, by several turns of a scheduler that shares its cores: a question
has to be asked first, and a turn must come once it is late."""


@pytest.fixture(scope="module")
def expected(servers: Servers) -> Expected:
    return answers(servers["exact"].url, PROMPTS, TOKENS)


def load(server: Server, expected: Expected, seed: int) -> Load:
    return Load(server.url, PROMPTS, TOKENS, expected, CLIENTS, seed)


def assert_right(load: Load) -> None:
    print(f"{load.answered} answers, {load.cached_tokens} tokens from the cache, near-ties: {load.near_ties}")
    assert not load.failed and not load.wrong, (load.failed, load.wrong)


def assert_nothing_is_left(server: Server, audits: int) -> None:
    server.flush()
    stats = server.wait_for_audit(audits)
    assert stats["dense_frames_used"] == stats["mosaic_frames_used"] == 0, stats
    assert stats["step_audits"] > 0
    assert server.trouble() == []


def test_pauses_change_no_token(servers: Servers, exact_server: Server, expected: Expected) -> None:
    stats = exact_server.stats()
    with pauses(servers.jitter), load(exact_server, expected, 0) as disturbed:
        wait_for(lambda: disturbed.answered >= 2 * len(PROMPTS) or disturbed.failed, "the load", 300)
    assert_right(disturbed)
    assert exact_server.stats()["host"]["restored"] > stats["host"]["restored"]
    assert_nothing_is_left(exact_server, stats["audits"])


def test_a_manager_that_is_killed_and_stopped_changes_no_token(
    servers: Servers, exact_server: Server, expected: Expected
) -> None:
    server, shm = exact_server, shared_memory_files()
    stats = server.stats()
    with load(server, expected, 1) as disturbed:
        kill_managers(server.process.pid, KILLS, seed=0)
        wait_for_work(server.process.pid, lambda: server.stats()["host"])
        answered = disturbed.answered
        assert stop_manager(server.process.pid, STOP_S), "a working manager did not survive a short stop"
        wait_for_work(server.process.pid, lambda: server.stats()["host"])
        wait_for(lambda: disturbed.answered >= answered + len(PROMPTS) or disturbed.failed, "the load", 300)
    assert_right(disturbed)
    client = server.stats()["host"]["client"]
    assert client["deaths"] >= stats["host"]["client"]["deaths"] + KILLS
    assert client["silences"] > stats["host"]["client"]["silences"]
    assert_nothing_is_left(server, stats["audits"])
    assert shared_memory_files() == shm
    manager = manager_of(server.process.pid)
    servers.stop("exact")
    assert manager is not None and not psutil.pid_exists(manager.pid)
    assert shared_memory_files() == shm
