"""What the benchmarks of faults and of restoring make of what they saw."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

import psutil
import pytest

from benchmark.common.errors import BenchmarkError
from benchmark.manager.break_even import break_even
from benchmark.manager.fault_load import Reply, difference, shared_prefix_prompts
from benchmark.manager.faults import failures
from benchmark.manager.saboteur import manager_of, wait_for


def reply(*tokens: int, gap: float = 1.0) -> Reply:
    return Reply(tokens, (gap,) * len(tokens), 0)


def test_an_answer_may_be_any_of_those_of_a_server_left_alone() -> None:
    assert difference([reply(1, 2, 3), reply(1, 4, 5)], reply(1, 4, 5)) is None
    text, near_tie = difference([reply(1, 2, 3), reply(1, 4, 5)], reply(1, 4, 6))
    assert text.startswith("token 2 is 6 instead of 5") and not near_tie
    assert difference([reply(1, 2, gap=0.005)], reply(1, 3))[1]


def test_prompts_share_their_beginnings_in_families() -> None:
    prompts = shared_prefix_prompts(2, 2, 100, 20)
    assert len(set(prompts.values())) == 4
    assert prompts["0.0"][:300] == prompts["0.1"][:300] != prompts["1.0"][:300]


def good() -> dict[str, Any]:
    load = {"wrong": [], "failed": []}
    row = {**load, "records_found": 3, "hits_disk": 2}
    manager = {
        "undisturbed": load,
        "disturbed": load,
        "kills": 2,
        "deaths_noticed": 2,
        "stopped_s": 1.0,
        "silences_noticed": 1,
        "frames_left": 0,
        "trouble": [],
    }
    return {"manager": manager, "server": [{**row, "records_found": 0, "hits_disk": 0}, row], "left_behind": []}


def test_nothing_may_be_lost_but_hits() -> None:
    assert failures(good()) == []
    for part, change in (
        ("manager", {"frames_left": 1}),
        ("manager", {"deaths_noticed": 1}),
        ("manager", {"silences_noticed": 0}),
        ("manager", {"trouble": ["Traceback"]}),
        ("manager", {"disturbed": {"wrong": ["a"], "failed": []}}),
        ("manager", {"disturbed": {"wrong": [], "failed": ["a"]}}),
    ):
        result = good()
        result[part].update(change)
        assert len(failures(result)) == 1, change
    result = good()
    result["server"][1]["hits_disk"] = 0
    assert len(failures(result)) == 1
    assert failures({**good(), "left_behind": ["process 1"]}) == ["left behind: process 1"]


def test_it_pays_from_the_length_on_that_nothing_longer_contradicts() -> None:
    def rows(*ratios: float, computed: float = 0.0) -> list[dict[str, Any]]:
        return [{"tokens": 64 << i, "ratio": x, "recomputed_share": computed} for i, x in enumerate(ratios)]

    assert break_even(rows(0.9, 1.1, 0.8, 0.2)) == 256
    assert break_even(rows(0.9, 0.8)) == 64
    assert break_even(rows(0.9, 1.0)) is None
    # Nothing came back: it is as fast as computing because it was computed.
    assert break_even(rows(0.9, 0.99, computed=0.8)) is None


def test_a_manager_is_found_below_its_server_only() -> None:
    code = "import subprocess, sys, time; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)', {0!r}])"
    servers = [
        subprocess.Popen([sys.executable, "-c", code.format(name)]) for name in ("sglang_mosaic.manager", "another")
    ]
    try:
        wait_for(lambda: all(psutil.Process(server.pid).children() for server in servers), "two children")
        wait_for(lambda: manager_of(servers[0].pid) is not None, "the manager")
        assert manager_of(servers[0].pid).ppid() == servers[0].pid
        assert manager_of(servers[1].pid) is None
    finally:
        for server in servers:
            for process in [*psutil.Process(server.pid).children(), server]:
                process.kill()
            server.wait()
    assert manager_of(servers[0].pid) is None


def test_what_does_not_come_is_an_error() -> None:
    start = time.monotonic()
    with pytest.raises(BenchmarkError, match=r"the moon did not happen in 0\.1 s"):
        wait_for(lambda: False, "the moon", patience_s=0.1)
    assert time.monotonic() - start < 5
