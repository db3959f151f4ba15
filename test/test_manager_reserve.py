"""Memory that the manager has before it needs it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from sglang_mosaic.manager import reserve as module
from sglang_mosaic.manager.child import allocator_options
from sglang_mosaic.manager.reserve import Reserve

MIB = 1 << 20
STORING = """
import resource, sys
from sglang_mosaic.manager.reserve import Reserve
if sys.argv[1] == "ahead":
    reserve = Reserve(64 << 20)
    assert [reserve.keep_ahead(0) for _ in range(3)] == [True, True, False]
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
records = [b"x" * (2 << 20) for _ in range(30)]
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    """Of a process that stores 60 MiB."""
    environment = {**os.environ, **allocator_options()}
    done = subprocess.run([sys.executable, "-c", STORING, how], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_storing_waits_for_no_memory() -> None:
    assert faults("ahead") * 10 < faults("not ahead")


def test_it_is_filled_up_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RESERVE_BYTES", 16 * MIB)
    monkeypatch.setattr(module, "STEP_BYTES", 8 * MIB)
    monkeypatch.setattr(module, "_PIECE", MIB)
    reserve = Reserve(40 * MIB)
    stored = [0, 0, 0, 4, 9, 9, 20, 30, 40, 5]
    steps = [True, True, False, False, True, False, True, True, False, False]
    assert [reserve.keep_ahead(mib * MIB) for mib in stored] == steps


def test_a_large_store_has_a_share_of_it_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RESERVE_BYTES", MIB)
    monkeypatch.setattr(module, "STEP_BYTES", MIB)
    monkeypatch.setattr(module, "_PIECE", MIB)
    reserve = Reserve(32 * MIB)
    assert [reserve.keep_ahead(0) for _ in range(5)] == [True] * 4 + [False]
    assert [reserve.keep_ahead(2 * MIB) for _ in range(3)] == [True] * 2 + [False]
    monkeypatch.setattr(module, "MOST_RESERVE_BYTES", 3 * MIB)
    reserve = Reserve(32 * MIB)
    assert [reserve.keep_ahead(0) for _ in range(4)] == [True] * 3 + [False]


def test_a_small_store_has_none() -> None:
    assert not Reserve(MIB).keep_ahead(0)
