"""A manager that is killed and stopped while its server evicts and restores: hits are lost, nothing else.

benchmark/manager/faults.py does it a hundred times, and kills the server, too.
"""

from __future__ import annotations

import os
import warnings

import psutil
import pytest

from answers import NearTieWarning
from benchmark.manager.fault_load import Load, ask, shared_prefix_prompts
from benchmark.manager.saboteur import kill_managers, stop_manager, wait_for
from real_server import Server

pytestmark = pytest.mark.server

PROMPTS = shared_prefix_prompts(families=7, members=2, shared_tokens=800, own_tokens=80)
"""More than the pool holds."""
TOKENS = 2
CLEAR = 0.25
"""Gap between the two best log-probabilities that bf16 does not bridge: two steps of a logit. How much of a prefix was
in the cache changes logits by such a step, in any server."""
KILLS = 8
STOP_S = 5.0
"""Longer than a manager may be silent."""


def test_every_answer_is_that_of_a_server_whose_manager_was_left_alone(off_server: Server) -> None:
    server, root = off_server, off_server.process.pid
    shm = set(os.listdir("/dev/shm"))
    server.flush()
    audits = server.stats()["audits"]
    replies = {name: ask(server.url, prompt, TOKENS) for name, prompt in PROMPTS.items()}
    expected = {name: [reply] for name, reply in replies.items() if min(reply.gaps) > CLEAR}
    assert len(expected) >= 5, "too few prompts have a clear answer"
    wait_for(lambda: server.stats()["host"]["connected"], "the manager's start")
    before = server.stats()["host"]
    with Load(server.url, PROMPTS, TOKENS, expected, clients=2, seed=1) as load:
        # Pages come back before anything goes wrong.
        wait_for(lambda: server.stats()["host"]["restored"] > before["restored"] or load.failed, "a restore")
        kill_managers(root, KILLS, seed=1)
        wait_for(lambda: server.stats()["host"]["connected"], "the manager's return")
        stop_manager(root, STOP_S)
        wait_for(lambda: server.stats()["host"]["connected"], "the manager's return")
        returned = server.stats()["host"]["restored"]
        wait_for(lambda: server.stats()["host"]["restored"] > returned or load.failed, "a restore after all that")
    assert load.failed == [] and load.wrong == [], (load.failed, load.wrong)
    for line in load.near_ties:
        warnings.warn(line, NearTieWarning, stacklevel=1)
    stats = server.wait_for_audit(audits)
    client = stats["host"]["client"]
    assert client["deaths"] - before["client"]["deaths"] >= KILLS
    assert client["silences"] > before["client"]["silences"]
    assert stats["pages_encoded"] == 0 and server.trouble() == []
    server.flush()
    assert server.stats()["dense_frames_used"] == 0
    # One manager, and nothing that has a name.
    living = [p for p in psutil.Process(root).children(recursive=True) if "sglang_mosaic.manager" in p.cmdline()]
    assert len(living) == 1
    assert set(os.listdir("/dev/shm")) <= shm
